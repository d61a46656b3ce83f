"""Sphinx configuration: ``sphinx-build -W -b html docs docs/_build``.

Nothing is fetched, neither by the build nor by a reader: no intersphinx, and formulas become MathML
here instead of a script from elsewhere.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# the docstrings of this checkout, whatever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hysafe import __version__

project = "hysafe"
author = "the hysafe authors"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"hysafe {release}"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False  # those of Lightning speak of pages that are not here
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# attributes of one name in several classes: napoleon links each mention, Sphinx cannot choose
suppress_warnings = ["ref.python"]


def setup(app: Any) -> dict[str, bool]:
    """Register the renderer of formulas and the reader of docstrings."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("autodoc-process-docstring", _norms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline(writer: Any, node: nodes.Element) -> None:
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.Element) -> None:
    formula = tex2mathml(node.astext(), as_block=True)
    writer.body.append(f'<p class="formula">{formula}</p>\n')
    raise nodes.SkipNode


def _norms(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Let |x| in a docstring be a norm and not a substitution of reStructuredText."""
    parts = re.split(r"(`[^`]*`|\.\. math::.*)", "\n".join(lines))
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")

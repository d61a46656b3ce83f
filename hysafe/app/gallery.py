"""A self-contained page of items: what a search found, what a new policy changed.

Names, texts and pictures of a collection are hostile input: all of it is escaped, the page has no
script, and a content security policy allows its style sheet and ``data:`` pictures only. Pictures
are blurred until they are clicked. A picture to which a text-only node may apply is never shown.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hysafe.data.images import thumbnail
from hysafe.errors import InputError
from hysafe.taxonomy import Taxonomy
from hysafe.types import Result

__all__ = ["Card", "card_of", "write_gallery"]

MAX_TEXT = 600

STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
*{box-sizing:border-box}
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1200px;padding:24px}
h1{font-size:1.5rem;margin:0 0 .3em;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:2em 0 .6em}
dl{display:flex;flex-wrap:wrap;gap:.3em 1.5em;margin:0 0 1em}dt{opacity:.65}dt,dd{margin:0}
dl div{display:flex;gap:.5em}
ol{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:14px;padding:0;
list-style:none}
li{border:1px solid var(--line);border-radius:10px;padding:12px;overflow-wrap:anywhere}
.top{display:flex;justify-content:space-between;gap:8px;font-variant-numeric:tabular-nums}
.rating{font-weight:650;white-space:nowrap}.unsafe{color:#c62828}.review{color:#a86500}.safe{color:#2e7d32}
@media(prefers-color-scheme:dark){.unsafe{color:#ff8a80}.review{color:#ffca5f}.safe{color:#81c995}}
.picture{display:block;overflow:hidden;border-radius:6px;margin:8px 0;background:var(--soft);
cursor:pointer;text-align:center}
.picture input{position:absolute;opacity:0}
.picture img{display:block;margin:0 auto;max-width:100%;filter:blur(18px)}
.picture input:checked+img{filter:none}
.picture input:focus-visible+img{outline:3px solid Highlight}
.withheld{padding:24px 8px;text-align:center;background:var(--soft);border-radius:6px;margin:8px 0}
blockquote{margin:8px 0;padding:6px 10px;background:var(--soft);border-radius:6px;
white-space:pre-wrap}
small{display:block;opacity:.75}
"""


@dataclass(frozen=True)
class Card:
    """One item of the page.

    Args:
        rating: its rating. lead: what stands beside it, a distance or a change.
        name: source. lines: more to say. text: shown cut. picture: small JPEG, or None.
        withheld: a picture that is not shown.
    """

    rating: str
    lead: str
    name: str
    lines: Sequence[str] = field(default_factory=tuple)
    text: str = ""
    picture: bytes | None = None
    withheld: bool = False


def card_of(
    result: Result,
    taxonomy: Taxonomy,
    *,
    lead: str,
    text: str = "",
    image: bytes | None = None,
    lines: Sequence[str] = (),
) -> Card:
    """Card of a judged item.

    Args:
        taxonomy: of the policy view it was judged under.
        image: the encoded picture.
    """
    hidden = image is not None and _text_only(result, taxonomy)
    picture = None
    if image is not None and not hidden and result.p_unsafe is not None:
        try:
            picture = thumbnail(image)
        except InputError:
            picture = None
    best = [" › ".join(result.paths[0].path)] if result.paths else []
    return Card(
        result.rating, lead, result.source, [*best, *lines], text[:MAX_TEXT], picture, hidden
    )


def write_gallery(
    path: Path,
    title: str,
    facts: Mapping[str, str],
    sections: Sequence[tuple[str, Sequence[Card]]],
) -> None:
    """Write the page, whole or not at all.

    Args:
        facts: label -> value, below the title.
        sections: heading and cards.

    Raises:
        InputError: the file cannot be written.
    """
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    rows = "".join(
        f"<div><dt>{html.escape(k)}</dt><dd><bdi>{html.escape(v)}</bdi></dd></div>"
        for k, v in facts.items()
    )
    body = "".join(
        f"<h2>{html.escape(heading)}</h2><ol>{''.join(map(_card, cards))}</ol>"
        for heading, cards in sections
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{html.escape(title)} · hysafe</title><style>{STYLE}</style></head><body>"
        f"<h1><bdi>{html.escape(title)}</bdi></h1><dl>{rows}</dl>"
        "<p><strong>For triage, not a verdict.</strong> Pictures are blurred: click one to see "
        f"it.</p>{body}</body></html>\n"
    )
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(page.encode("utf-8", "replace"))
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}). Name another file."
        ) from error


def _card(card: Card) -> str:
    picture = ""
    if card.withheld:
        picture = '<div class="withheld">Picture withheld</div>'
    elif card.picture is not None:
        data = base64.b64encode(card.picture).decode("ascii")
        picture = (
            '<label class="picture"><input type="checkbox" aria-label="Show the picture">'
            f'<img alt="" src="data:image/jpeg;base64,{data}"></label>'
        )
    text = f"<blockquote><bdi>{html.escape(card.text)}</bdi></blockquote>" if card.text else ""
    lines = "".join(f"<small><bdi>{html.escape(line)}</bdi></small>" for line in card.lines)
    rating = html.escape(card.rating)
    return (
        f'<li><div class="top"><span class="rating {rating}">{rating}</span>'
        f"<span>{html.escape(card.lead)}</span></div>{picture}{text}"
        f"<bdi>{html.escape(card.name)}</bdi>{lines}</li>"
    )


def _text_only(result: Result, taxonomy: Taxonomy) -> bool:
    """Whether a node that must not be illustrated is named for the item, as in the report."""
    named = [p.node for p in result.paths]
    if result.rating != "safe":
        channels = (c for c in result.channels.values() if isinstance(c, dict))
        named += [c["top"] for c in channels if isinstance(c.get("top"), str)]
    return any(n in taxonomy and taxonomy[n].text_only for n in named)

"""Published losses as data: which pairs are contrasted and which role entails which.

A preset names roles. MERU has ``text`` and ``image``; HyCoCLIP adds ``text_box``, ``image_box``
(the more general parts); HySAC has ``text``, ``image`` (safe) and ``unsafe_text``,
``unsafe_image``. :func:`preset_loss` needs nothing else, so a new loss is a new entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hysafe.errors import ConfigError
from hysafe.geometry import Space
from hysafe.loss.contrastive import contrastive
from hysafe.loss.entailment import entailment

__all__ = ["PRESETS", "Contrast", "Entail", "Preset", "preset_loss"]


@dataclass(frozen=True)
class Contrast:
    """A term weight * C(a, b); not symmetric: only the cross entropy of finding b from a."""

    a: str
    b: str
    weight: float = 1.0
    symmetric: bool = True


@dataclass(frozen=True)
class Entail:
    """A term weight * E_eta(parent, child): parent entails child."""

    parent: str
    child: str
    weight: float = 1.0
    eta: float = 1.0


@dataclass(frozen=True)
class Preset:
    """A sum of terms."""

    contrasts: tuple[Contrast, ...]
    entailments: tuple[Entail, ...]

    @property
    def roles(self) -> tuple[str, ...]:
        """Role names the loss needs, in order of appearance."""
        names = [n for t in self.contrasts for n in (t.a, t.b)]
        names += [n for t in self.entailments for n in (t.parent, t.child)]
        return tuple(dict.fromkeys(names))


def _hycoclip() -> Preset:
    # four cross entropies of weight 1/4: image -> text, text -> image (together one symmetric term
    # of weight 1/2), and boxes to whole texts and images, but not back: a box fits many of them
    return Preset(
        (
            Contrast("image", "text", 0.5),
            Contrast("image_box", "text", 0.25, symmetric=False),
            Contrast("text_box", "image", 0.25, symmetric=False),
        ),
        (
            Entail("text", "image", 0.1, 0.7),
            Entail("text_box", "image_box", 0.1, 0.7),
            Entail("image_box", "image", 0.1, 1.2),
            Entail("text_box", "text", 0.1, 1.2),
        ),
    )


def _hysac(weight: float = 0.2) -> Preset:
    t, i, tu, iu = "text", "image", "unsafe_text", "unsafe_image"
    return Preset(
        (Contrast(t, i), Contrast(tu, iu), Contrast(t, iu), Contrast(tu, i)),
        (Entail(t, i, weight), Entail(tu, iu, weight), Entail(i, tu, weight)),
    )


PRESETS: Mapping[str, Preset] = {
    # Desai et al. 2023, eq. 12
    "meru": Preset((Contrast("image", "text"),), (Entail("text", "image", 0.2),)),
    # Pal et al. 2025, eq. 9
    "hycoclip": _hycoclip(),
    # Poppi et al. 2025: chain safe text << safe image << unsafe text << unsafe image
    "hysac": _hysac(),
}


def preset_loss(
    preset: str | Preset,
    points: Mapping[str, Tensor],
    c: Tensor | float,
    scale: Tensor | float,
    *,
    space: Space,
) -> dict[str, Tensor]:
    """Every term of a preset by name, and their weighted sum under ``loss``.

    Args:
        preset: a name in :data:`PRESETS` or a Preset.
        points: role -> space components [B, D], the same B, row i belongs together.
        c: curvature magnitude. scale: inverse temperature of the contrasts.
        space: the geometry.

    Raises:
        ConfigError: unknown preset or a missing role.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ConfigError(f"loss preset {preset!r}: known are {', '.join(PRESETS)}.")
        preset = PRESETS[preset]
    missing = [r for r in preset.roles if r not in points]
    if missing:
        raise ConfigError(f"the loss needs points for {', '.join(missing)}; got {list(points)}.")
    terms: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    for t in preset.contrasts:
        name = f"contrast_{t.a}_{t.b}"
        terms[name] = contrastive(
            points[t.a], points[t.b], c, scale, space=space, symmetric=t.symmetric
        )
        weights[name] = t.weight
    for e in preset.entailments:
        name = f"entail_{e.parent}_{e.child}"
        terms[name] = entailment(points[e.parent], points[e.child], c, space=space, eta=e.eta)
        weights[name] = e.weight
    total = sum((weights[k] * v for k, v in terms.items()), start=next(iter(terms.values())) * 0)
    return {"loss": total, **terms}

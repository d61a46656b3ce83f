"""Every preset against its formula in the design, term by term, with losses written out here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hysafe.errors import ConfigError
from hysafe.geometry import Space, get_space
from hysafe.loss import PRESETS, Preset, preset_loss
from hysafe.loss.presets import Contrast, Entail

C, SCALE = 1.3, 4.0
ROLES = ("text", "image", "text_box", "image_box", "unsafe_text", "unsafe_image")


@pytest.fixture(params=["lorentz", "euclidean"])
def space(request: pytest.FixtureRequest) -> Space:
    return get_space(request.param)


def batch(space: Space) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {
        role: space.exp_map0(torch.randn(5, 4, generator=generator, dtype=torch.float64), C)
        for role in ROLES
    }


class Terms:
    """CE, C and E of the design, on one batch."""

    def __init__(self, space: Space) -> None:
        self.space, self.points = space, batch(space)

    def ce(self, a: str, b: str) -> Tensor:
        x, y = self.points[a], self.points[b]
        logits = torch.stack([-SCALE * self.space.dist(x, row[None], C) for row in y], dim=1)
        return F.cross_entropy(logits, torch.arange(len(x)))

    def c(self, a: str, b: str) -> Tensor:
        return (self.ce(a, b) + self.ce(b, a)) / 2

    def e(self, parent: str, child: str, eta: float = 1.0) -> Tensor:
        x, y = self.points[parent], self.points[child]
        angle = self.space.exterior_angle(x, y, C)
        return (angle - eta * self.space.half_aperture(x, C)).clamp_min(0).mean()


def meru(t: Terms) -> Tensor:
    """C(I,T) + 0.2 E(T,I)."""
    return t.c("image", "text") + 0.2 * t.e("text", "image")


def hycoclip(t: Terms) -> Tensor:
    """1/4 sum CE + 0.1 [E_0.7(T,I) + E_0.7(Tb,Ib) + E_1.2(Ib,I) + E_1.2(Tb,T)].

    The four cross entropies of the paper: image and text both ways, and each box to the other
    modality's whole (a box is found from no whole: it fits many).
    """
    entropies = (
        t.ce("image", "text") + t.ce("text", "image")
        + t.ce("image_box", "text") + t.ce("text_box", "image")
    )  # fmt: skip
    cones = (
        t.e("text", "image", 0.7) + t.e("text_box", "image_box", 0.7)
        + t.e("image_box", "image", 1.2) + t.e("text_box", "text", 1.2)
    )  # fmt: skip
    return entropies / 4 + 0.1 * cones


def hysac(t: Terms) -> Tensor:
    """C(T,I) + C(T*,I*) + C(T,I*) + C(T*,I) + lambda (E(T,I) + E(T*,I*) + E(I,T*))."""
    contrasts = (
        t.c("text", "image") + t.c("unsafe_text", "unsafe_image")
        + t.c("text", "unsafe_image") + t.c("unsafe_text", "image")
    )  # fmt: skip
    chain = t.e("text", "image") + t.e("unsafe_text", "unsafe_image") + t.e("image", "unsafe_text")
    return contrasts + 0.2 * chain


FORMULAS: dict[str, Callable[[Terms], Tensor]] = {
    "meru": meru,
    "hycoclip": hycoclip,
    "hysac": hysac,
}


def test_every_preset_has_its_formula_here() -> None:
    assert set(FORMULAS) == set(PRESETS), "write the formula of the new preset in FORMULAS"


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_a_preset_equals_its_formula_in_value_and_gradient(name: str, space: Space) -> None:
    terms = Terms(space)
    points = [terms.points[role].requires_grad_() for role in PRESETS[name].roles]
    got = preset_loss(name, terms.points, C, SCALE, space=space)["loss"]
    expected = FORMULAS[name](terms)
    torch.testing.assert_close(got, expected)
    gradients = torch.autograd.grad(got, points), torch.autograd.grad(expected, points)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_terms_are_reported_by_name_and_unweighted(name: str, space: Space) -> None:
    terms, preset = Terms(space), PRESETS[name]
    got = preset_loss(name, terms.points, C, SCALE, space=space)
    expected = {"loss"}
    for k in preset.contrasts:
        value = terms.c(k.a, k.b) if k.symmetric else terms.ce(k.a, k.b)
        torch.testing.assert_close(got[f"contrast_{k.a}_{k.b}"], value)
        expected.add(f"contrast_{k.a}_{k.b}")
    for k in preset.entailments:
        torch.testing.assert_close(
            got[f"entail_{k.parent}_{k.child}"], terms.e(k.parent, k.child, k.eta)
        )
        expected.add(f"entail_{k.parent}_{k.child}")
    assert set(got) == expected  # no two terms share a name


def test_a_preset_asks_for_the_roles_it_uses_and_nothing_else() -> None:
    assert set(PRESETS["meru"].roles) == {"image", "text"}
    assert set(PRESETS["hycoclip"].roles) == {"image", "text", "image_box", "text_box"}
    assert set(PRESETS["hysac"].roles) == {"text", "image", "unsafe_text", "unsafe_image"}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_role_gets_a_gradient(name: str, space: Space) -> None:
    points = {r: p.requires_grad_() for r, p in batch(space).items()}
    preset_loss(name, points, C, SCALE, space=space)["loss"].backward()
    for role, point in points.items():
        used = role in PRESETS[name].roles
        assert (point.grad is not None) == used, role
        if point.grad is not None:
            assert torch.isfinite(point.grad).all()
            assert float(point.grad.norm()) > 1e-6, role


def test_a_new_loss_is_a_new_entry(space: Space) -> None:
    terms = Terms(space)
    mine = Preset((Contrast("text", "text_box", 2.0),), (Entail("image", "text", 3.0, 0.5),))
    got = preset_loss(mine, terms.points, C, SCALE, space=space)["loss"]
    expected = 2 * terms.c("text", "text_box") + 3 * terms.e("image", "text", 0.5)
    torch.testing.assert_close(got, expected)


def test_an_unknown_preset_is_named_with_the_known_ones(space: Space) -> None:
    with pytest.raises(ConfigError, match=r"preset 'merou': known are meru, hycoclip, hysac\."):
        preset_loss("merou", batch(space), C, SCALE, space=space)


def test_missing_roles_are_named_with_those_given(space: Space) -> None:
    points = {k: v for k, v in batch(space).items() if k in ("text", "image", "unsafe_text")}
    with pytest.raises(ConfigError, match=r"needs points for unsafe_image; got \['text', 'image'"):
        preset_loss("hysac", points, C, SCALE, space=space)
    with pytest.raises(ConfigError, match="image_box, text_box"):
        preset_loss("hycoclip", points, C, SCALE, space=space)

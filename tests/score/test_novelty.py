"""Novelty scorers: one contract for all, references from scikit-learn and explicit loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NearestNeighbors

from hysafe.errors import ConfigError, ModelError, ShapeError
from hysafe.geometry import Points, cones, lorentz
from hysafe.score import novelty
from hysafe.score.novelty import (
    LEAST_SHRINKAGE,
    SCORERS,
    ClassCones,
    CombinedScorer,
    ConeEnergy,
    ConeMargin,
    DiscriminantClasses,
    DiscriminantKNN,
    Encoded,
    LorentzKNN,
    Mahalanobis,
    NoveltyScorer,
    Radius,
    RelativeMahalanobis,
    StandIns,
    _in_chunks,
    class_folds,
    load_scorer,
    save_scorer,
    shrunk_covariance,
    stand_in_scores,
)

DIM, WIDTH, CLASSES = 6, 9, 4
C = 0.7

# one of every kind and setting; the contract is checked for each
MAKERS: dict[str, Callable[[], NoveltyScorer]] = {
    "cone margin": ConeMargin,
    "cone energy": ConeEnergy,
    "radius": Radius,
    "k-nn": lambda: LorentzKNN(3),
    "k-nn whitened": lambda: LorentzKNN(3, whiten=True),
    "k-nn features": lambda: LorentzKNN(3, "features"),
    "k-nn whitened features": lambda: LorentzKNN(3, "features", whiten=True),
    "mahalanobis": Mahalanobis,
    "mahalanobis features": lambda: Mahalanobis("features", 0.2),
    "relative": RelativeMahalanobis,
    "class cones": ClassCones,
    "discriminant k-nn": lambda: DiscriminantKNN(k=3),
    "discriminant k-nn points": lambda: DiscriminantKNN("points", 1.0, k=5, local=0.0),
    "discriminant classes": DiscriminantClasses,
    "combined": lambda: CombinedScorer([LorentzKNN(2), Mahalanobis("features"), ConeEnergy()]),
}
# How unsure the class is: what lies far beyond one class is sure to be of it.
DOUBTS = {"discriminant classes"}
RANKS_WITHOUT_FIT = {"cone margin", "cone energy", "radius"}


def items(n: int, seed: int, *, shift: float = 0.0, c: float = C) -> tuple[Encoded, torch.Tensor]:
    """Items of CLASSES clusters in direction and radius; `shift` moves them off all clusters.

    Margins are those of cones on the clusters' rays.
    """
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    centres = torch.eye(DIM)[:CLASSES] * 1.5
    away = torch.eye(DIM)[CLASSES] * shift
    tangent = centres[labels] * (1 if shift == 0 else 0.1) + away
    tangent = tangent + 0.15 * torch.randn(n, DIM, generator=g)
    points = Points.from_tangent(tangent, c)
    apexes = Points.from_tangent(centres * 0.4, c)
    mix = torch.randn(DIM, WIDTH, generator=torch.Generator().manual_seed(0))
    features = tangent @ mix + 0.05 * torch.randn(n, WIDTH, generator=g)
    return Encoded(points, points.margin(apexes) * 5, features), labels


@pytest.fixture(scope="module")
def known() -> tuple[Encoded, torch.Tensor]:
    return items(120, 1)


# ---------------------------------------------------------------- the contract


def test_every_registered_scorer_is_in_the_contract() -> None:
    assert {SCORERS[make().name] for make in MAKERS.values()} == set(SCORERS.values())
    assert all(SCORERS[name].name == name for name in SCORERS)


@pytest.mark.parametrize("kind", MAKERS)
def test_higher_is_more_novel(kind: str, known: tuple[Encoded, torch.Tensor]) -> None:
    scorer = MAKERS[kind]().fit(*known)
    inside = scorer.score(items(60, 2)[0])
    outside = scorer.score(items(60, 3, shift=0.8)[0])
    assert inside.shape == (60,)
    assert inside.dtype == torch.double
    level = 0.5 if kind in DOUBTS else 0.9
    assert float(outside.median()) > float(inside.quantile(level))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_score_depends_on_its_item_alone(kind: str, known: tuple[Encoded, torch.Tensor]) -> None:
    scorer = MAKERS[kind]().fit(*known)
    batch, _ = items(11, 4)
    whole = scorer.score(batch)
    parts = torch.cat([scorer.score(batch[slice(i, i + 1)]) for i in range(11)])
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-6)
    assert scorer.score(batch[slice(0, 0)]).shape == (0,)


@pytest.mark.parametrize("kind", MAKERS)
def test_saved_and_loaded_it_scores_alike(
    kind: str, known: tuple[Encoded, torch.Tensor], tmp_path: Path
) -> None:
    scorer = MAKERS[kind]().fit(*known)
    save_scorer(scorer, tmp_path / "scorer.safetensors")
    again = load_scorer(tmp_path / "scorer.safetensors")
    assert type(again) is type(scorer)
    assert again.settings() == scorer.settings()
    batch, _ = items(20, 5, shift=0.3)
    assert torch.equal(again.score(batch), scorer.score(batch))


@pytest.mark.parametrize("kind", sorted(set(MAKERS) - RANKS_WITHOUT_FIT))
def test_before_it_is_fitted_it_says_so(kind: str) -> None:
    scorer = MAKERS[kind]()
    with pytest.raises(ModelError, match=r"fit\("):
        scorer.score(items(3, 1)[0])
    with pytest.raises(ModelError, match=r"fit\("):
        scorer.state()


@pytest.mark.parametrize("kind", MAKERS)
def test_wrong_input_is_refused(kind: str, known: tuple[Encoded, torch.Tensor]) -> None:
    encoded, labels = known
    with pytest.raises(ShapeError, match="nothing to fit on"):
        MAKERS[kind]().fit(encoded[slice(0, 0)], labels[:0])
    with pytest.raises(ShapeError, match="one each"):
        MAKERS[kind]().fit(encoded, labels[:-1])
    if SCORERS[MAKERS[kind]().name].needs_labels or "whitened" in kind:
        with pytest.raises(ShapeError, match="labels"):
            MAKERS[kind]().fit(encoded)
    bare = Encoded(encoded.points)
    if kind in ("cone margin", "cone energy") or "features" in kind:
        with pytest.raises(ShapeError, match="Encoded"):
            MAKERS[kind]().fit(bare, labels)


@pytest.mark.parametrize("kind", MAKERS)
def test_it_works_in_the_flat_space_of_the_control(kind: str) -> None:
    encoded, labels = items(80, 6)
    flat = Encoded(
        Points(encoded.points.tangent(), 1.0, "euclidean"), encoded.margins, encoded.features
    )
    scores = MAKERS[kind]().fit(flat, labels).score(flat)
    assert bool(scores.isfinite().all())


def test_items_of_different_length_are_refused() -> None:
    points = Points(torch.zeros(3, 2), 1.0)
    with pytest.raises(ShapeError, match=r"margins expected \[3"):
        Encoded(points, torch.zeros(2, 4))
    with pytest.raises(ShapeError, match=r"features expected \[3"):
        Encoded(points, features=torch.zeros(3))


def test_a_file_that_is_no_scorer_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(ModelError, match="not a saved novelty scorer"):
        load_scorer(file)
    file.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="Fit it again"):
        load_scorer(file)


# ---------------------------------------------------------------- cones


def test_cone_scores_are_their_formulas(known: tuple[Encoded, torch.Tensor]) -> None:
    encoded, _ = known
    assert encoded.margins is not None
    margins = encoded.margins.double().numpy()
    np.testing.assert_allclose(ConeMargin().score(encoded), -margins.max(1), rtol=1e-6)
    energy = -np.log(np.exp(margins).sum(1))
    np.testing.assert_allclose(ConeEnergy().score(encoded), energy, rtol=1e-6)
    radius = torch.stack([lorentz.dist0(x, C) for x in encoded.points.space])
    np.testing.assert_allclose(Radius().score(encoded), -radius.double(), rtol=1e-6)


def test_a_node_switched_off_makes_its_items_more_novel(
    known: tuple[Encoded, torch.Tensor],
) -> None:
    encoded, labels = known
    assert encoded.margins is not None
    off = Encoded(encoded.points, encoded.margins[:, 1:])
    gain = ConeMargin().score(off) - ConeMargin().score(encoded)
    assert bool((gain >= 0).all())
    assert float(gain[labels == 0].min()) > float(gain[labels != 0].max())


def test_class_cones_stand_on_the_rays_of_the_class_means(
    known: tuple[Encoded, torch.Tensor],
) -> None:
    encoded, labels = known
    scorer = ClassCones(share=0.3, temperature=0.0)
    scorer.fit(encoded, labels)
    tangent = lorentz.log_map0(encoded.points.space, C)
    best = []
    for point in encoded.points.space:
        margins = []
        for k in range(CLASSES):
            apex = lorentz.exp_map0(0.3 * tangent[labels == k].mean(0), C)
            margins.append(float(cones.margin(apex, point, C)))
        best.append(-max(margins))
    np.testing.assert_allclose(scorer.score(encoded), best, atol=2e-5)
    with pytest.raises(ConfigError, match="share"):
        ClassCones(share=0.0)


# ---------------------------------------------------------------- neighbours


@pytest.mark.parametrize("k", [1, 4])
def test_neighbours_are_geodesic_and_exact(
    k: int, known: tuple[Encoded, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hysafe.score.novelty.CHUNK_PAIRS", 300)  # several chunks
    encoded, _ = known
    batch = items(13, 7, shift=0.4)[0]
    got = LorentzKNN(k).fit(encoded).score(batch)
    for i, point in enumerate(batch.points.space):
        distances = sorted(float(lorentz.dist(point, y, C)) for y in encoded.points.space)
        assert float(got[i]) == pytest.approx(distances[k - 1], abs=1e-5)


def test_neighbours_in_tangent_coordinates_are_not_the_same() -> None:
    # across the ray distances grow with the radius, so the order of neighbours differs
    x = Points.from_tangent(torch.tensor([[3.0, 0.0]]), 1.0)
    bank = Points.from_tangent(torch.tensor([[3.0 * 0.96, 3.0 * 0.28], [1.9, 0.0]]), 1.0)
    near = float(LorentzKNN(1).fit(Encoded(bank)).score(Encoded(x)))
    assert near == pytest.approx(1.1, abs=1e-5)  # along the ray, though 0.85 away in the chart
    chart = NearestNeighbors(n_neighbors=1).fit(bank.tangent()).kneighbors(x.tangent())[1]
    assert chart[0, 0] == 0


def test_neighbours_of_features_rank_as_cosine_neighbours(
    known: tuple[Encoded, torch.Tensor],
) -> None:
    encoded, _ = known
    batch = items(40, 8, shift=0.5)[0]
    assert encoded.features is not None
    assert batch.features is not None
    got = LorentzKNN(5, "features").fit(encoded).score(batch)
    reference = NearestNeighbors(n_neighbors=5, metric="cosine").fit(encoded.features.numpy())
    cosine = reference.kneighbors(batch.features.numpy())[0][:, -1]
    assert np.array_equal(np.argsort(got.numpy()), np.argsort(cosine))


def test_whitening_makes_the_spread_within_classes_the_same_in_all_directions(
    known: tuple[Encoded, torch.Tensor],
) -> None:
    encoded, labels = known
    stretched = torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 9.0]))
    points = Points.from_tangent(encoded.points.tangent() @ stretched, C)
    scorer = LorentzKNN(3, whiten=True, shrinkage=0.0)
    scorer.fit(Encoded(points), labels)
    centre, factor = scorer.state()["centre"], scorer.state()["factor"]
    x = (points.tangent().double() - centre) @ factor
    means = torch.stack([x[labels == k].mean(0) for k in range(CLASSES)])
    within = x - means[labels]
    covariance = within.T @ within / len(within)
    torch.testing.assert_close(covariance, torch.eye(DIM).double(), atol=2e-2, rtol=0)


def test_more_neighbours_than_items_are_all_of_them() -> None:
    encoded, _ = items(5, 9)
    few, all_of_them = LorentzKNN(50).fit(encoded), LorentzKNN(5).fit(encoded)
    assert torch.equal(few.score(encoded), all_of_them.score(encoded))
    with pytest.raises(ConfigError, match="k=0"):
        LorentzKNN(0)
    with pytest.raises(ConfigError, match="layer"):
        LorentzKNN(1, "logits")  # type: ignore[arg-type]


# ---------------------------------------------------------------- discriminants


def test_leading_discriminants_are_those_of_sklearn() -> None:
    # classes of one size whose means lie 9, 6, 3 and 1 apart along axes that nothing else marks
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat_interleave(200)
    axes = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.double))[0]
    means = torch.zeros(5, 8, dtype=torch.double)
    means[range(1, 5), range(4)] = torch.tensor([9.0, 6, 3, 1], dtype=torch.double)
    x = (means[labels] + torch.randn(1000, 8, generator=g, dtype=torch.double)) @ axes
    encoded = Encoded(items(1000, 1)[0].points, None, x)
    lda = LinearDiscriminantAnalysis(solver="eigen").fit(x.numpy(), labels.numpy())
    for share, kept in ((0.5, 2), (0.75, 3), (1.0, 4)):
        scorer = DiscriminantKNN(share=share, shrinkage=0.0)
        factor = scorer.fit(encoded, labels).state()["factor"]
        assert factor.shape == (8, kept)
        other = torch.from_numpy(lda.scalings_[:, :kept])
        angles = torch.linalg.svdvals(torch.linalg.qr(factor)[0].T @ torch.linalg.qr(other)[0])
        assert float(angles.min()) > 0.999, share  # cosines between the two subspaces


@pytest.mark.parametrize("local", [0.0, 0.5])
def test_discriminant_neighbours_are_those_of_a_slow_reference(
    known: tuple[Encoded, torch.Tensor], local: float
) -> None:
    encoded, labels = known
    batch = items(12, 4)[0]
    scorer = DiscriminantKNN("features", 1.0, k=4, local=local)
    got = scorer.fit(encoded, labels).score(batch)
    state = scorer.state()

    def placed(e: Encoded) -> torch.Tensor:
        z = (e.vectors("features") - state["centre"]) @ state["factor"]
        z = z / z.norm(dim=-1, keepdim=True)
        return torch.stack([lorentz.exp_map0(row[None], C)[0] for row in z])

    bank, points = placed(encoded), placed(batch)
    between = torch.stack([lorentz.dist(b[None], bank, C) for b in bank])
    usual = torch.stack([row.sort().values[1:5].mean() for row in between])
    for k, point in enumerate(points):
        d = lorentz.dist(point[None], bank, C)
        near = d.argsort()[:4]
        expected = (d[near] - local * usual[near]).mean()
        torch.testing.assert_close(got[k], expected, atol=2e-5, rtol=1e-5)


def test_between_two_classes_is_novel_to_discriminant_classes(
    known: tuple[Encoded, torch.Tensor],
) -> None:
    encoded, labels = known
    features = encoded.features
    assert features is not None
    scorer = DiscriminantClasses(share=1.0).fit(encoded, labels)
    means = torch.stack([features[labels == k].mean(0) for k in range(CLASSES)])
    between = (means[0] + means[1])[None] / 2
    points = encoded.points
    halfway = scorer.score(Encoded(points[:1], None, between))
    at_mean = scorer.score(Encoded(points[:CLASSES], None, means))
    assert float(halfway) > float(at_mean.max())


def test_discriminants_refuse_what_they_cannot_do(known: tuple[Encoded, torch.Tensor]) -> None:
    encoded, labels = known
    with pytest.raises(ConfigError, match="share"):
        DiscriminantKNN(share=0.0)
    with pytest.raises(ConfigError, match="k=0"):
        DiscriminantKNN(k=0)
    with pytest.raises(ConfigError, match="temperature"):
        DiscriminantClasses(temperature=0.0)
    with pytest.raises(ShapeError, match="one item"):
        DiscriminantKNN("points").fit(encoded[:1], labels[:1])
    with pytest.raises(ShapeError, match="2 classes"):
        DiscriminantClasses("points").fit(encoded, labels % 2)


def test_a_known_item_is_at_distance_0_whatever_the_curvature(
    known: tuple[Encoded, torch.Tensor],
) -> None:
    encoded, labels = known
    scorer = DiscriminantKNN(k=1, local=0.0).fit(encoded, labels)
    others, _ = items(len(encoded), 4, c=5.0)
    again = Encoded(others.points, encoded.margins, encoded.features)
    assert float(scorer.score(again).abs().max()) < 1e-5


def test_chunks_of_points_have_the_neighbours_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    points = items(300, 1)[0].points
    whole = _in_chunks(points, points[:50], 3)
    seen: list[int] = []
    nearest = novelty._nearest

    def watched(some: Points, known: Points, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(some))
        return nearest(some, known, k)

    monkeypatch.setattr(novelty, "_nearest", watched)
    monkeypatch.setattr(novelty, "CHUNK_PAIRS", 700)
    parts = _in_chunks(points, points[:50], 3)
    assert max(seen) == 700 // 50  # the bank is larger than the neighbours with their numbers
    assert sum(seen) == 300
    assert torch.equal(parts[1], whole[1])
    torch.testing.assert_close(parts[0], whole[0])
    seen.clear()
    _in_chunks(points, points[:5], 3)
    assert max(seen) <= 700 // ((3 + novelty.TIES) * DIM)  # a small bank: the neighbours count


# ---------------------------------------------------------------- Gaussians


@pytest.mark.parametrize(("n", "d"), [(200, 5), (30, 40), (1000, 3)])
def test_shrinkage_is_that_of_ledoit_and_wolf(n: int, d: int) -> None:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=g, dtype=torch.double) * torch.arange(1, d + 1)
    x = x - x.mean(0)
    reference = LedoitWolf(assume_centered=True).fit(x.numpy())
    np.testing.assert_allclose(shrunk_covariance(x), reference.covariance_, rtol=1e-9)


def test_a_given_shrinkage_is_a_mixture_with_a_ball() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    s = x.T @ x / 50
    expected = 0.75 * s + 0.25 * s.trace() / 3 * torch.eye(3)
    torch.testing.assert_close(shrunk_covariance(x, 0.25), expected)
    least = shrunk_covariance(x[:2], 0.0)  # rank 2: still invertible
    assert float(torch.linalg.eigvalsh(least)[0]) > 0.1 * LEAST_SHRINKAGE
    with pytest.raises(ConfigError, match="shrinkage"):
        shrunk_covariance(x, 1.5)


@pytest.mark.parametrize("layer", ["points", "features"])
def test_mahalanobis_is_the_distance_to_the_nearest_mean(
    layer: str, known: tuple[Encoded, torch.Tensor]
) -> None:
    encoded, labels = known
    batch, _ = items(15, 10, shift=0.3)
    x, y = (
        e.vectors(layer).numpy()  # type: ignore[arg-type]
        for e in (encoded, batch)
    )
    means = np.stack([x[labels.numpy() == k].mean(0) for k in range(CLASSES)])
    within = LedoitWolf(assume_centered=True).fit(x - means[labels.numpy()])
    distances = [[(v - m) @ within.precision_ @ (v - m) for m in means] for v in y]
    nearest = np.min(distances, axis=1)
    got = Mahalanobis(layer).fit(encoded, labels).score(batch)  # type: ignore[arg-type]
    np.testing.assert_allclose(got, nearest, rtol=1e-6)
    whole = LedoitWolf().fit(x)
    relative = RelativeMahalanobis(layer).fit(encoded, labels).score(batch)  # type: ignore[arg-type]
    np.testing.assert_allclose(relative, nearest - whole.mahalanobis(y), rtol=1e-6, atol=1e-6)


def test_labels_may_be_any_integers(known: tuple[Encoded, torch.Tensor]) -> None:
    encoded, labels = known
    plain = Mahalanobis().fit(encoded, labels).score(encoded)
    torch.testing.assert_close(Mahalanobis().fit(encoded, labels * 7 - 3).score(encoded), plain)


def test_classes_of_equal_items_are_refused() -> None:
    encoded = Encoded(Points(torch.ones(6, 2), 1.0))
    with pytest.raises(ShapeError, match="items that vary"):
        Mahalanobis().fit(encoded, torch.zeros(6))


# ---------------------------------------------------------------- the combination


def test_folds_deal_every_class_once() -> None:
    labels = torch.tensor([5, 5, 2, 9, 1, 2, 7])
    folds = class_folds(labels, 3, generator=torch.Generator().manual_seed(1))
    assert len(folds) == 3
    assert sorted(torch.cat(folds).tolist()) == [1, 2, 5, 7, 9]
    assert len(class_folds(labels, 50, generator=torch.Generator().manual_seed(1))) == 5


def test_stand_ins_are_the_validation_items_of_classes_left_out(
    known: tuple[Encoded, torch.Tensor],
) -> None:
    encoded, labels = known
    validation, classes = items(40, 11)
    scorer = LorentzKNN(1)
    folds = [torch.tensor([2]), torch.tensor([0, 3]), torch.tensor([77])]
    found = stand_in_scores([scorer], encoded, labels, validation, classes, folds=folds)
    assert [s.novel.tolist() for s in found] == [
        (classes == 2).tolist(), ((classes == 0) | (classes == 3)).tolist()
    ]  # fmt: skip
    for fold, stand_in in zip(folds, found, strict=False):
        keep = ~torch.isin(labels, fold)
        alone = LorentzKNN(1).fit(encoded[keep]).score(validation)
        assert torch.equal(stand_in.scores[:, 0], alone)


def test_stand_ins_are_scored_with_their_nodes_off(known: tuple[Encoded, torch.Tensor]) -> None:
    encoded, labels = known
    validation, classes = items(40, 11)

    def without(left_out: torch.Tensor) -> tuple[Encoded, Encoded]:
        on = ~torch.isin(torch.arange(CLASSES), left_out)
        return (
            Encoded(encoded.points, encoded.margins[:, on]),  # type: ignore[index]
            Encoded(validation.points, validation.margins[:, on]),  # type: ignore[index]
        )

    folds = [torch.tensor([1])]
    off = stand_in_scores(
        [ConeMargin()], encoded, labels, validation, classes, folds=folds, without=without
    )[0]
    on = stand_in_scores([ConeMargin()], encoded, labels, validation, classes, folds=folds)[0]
    assert float(off.scores[off.novel].min()) > float(on.scores[on.novel].max())


def test_weights_go_to_the_parts_that_tell_and_never_below_zero() -> None:
    g = torch.Generator().manual_seed(3)
    novel = torch.rand(600, generator=g) < 0.2
    useful = torch.randn(600, generator=g) + 2.0 * novel
    useless = torch.randn(600, generator=g)
    backward = torch.randn(600, generator=g) - 2.0 * novel
    scores = torch.stack((1000 * useful, useless, backward), -1).double()
    scorer = CombinedScorer([LorentzKNN(1), Radius(), ConeMargin()])
    scorer.learn_weights([StandIns(scores, novel)])
    a, b, c = scorer.weights.values()
    assert a > 0.5  # whatever its unit
    assert b < 0.2 * a
    assert 0 <= c < 0.02 * a


def test_the_combination_is_the_weighted_sum_of_standardised_parts(
    known: tuple[Encoded, torch.Tensor],
) -> None:
    encoded, labels = known
    validation, classes = items(80, 12)
    parts: list[NoveltyScorer] = [LorentzKNN(2), Mahalanobis("features"), ConeEnergy()]
    folds = class_folds(labels, 4, generator=torch.Generator().manual_seed(0))
    stand_ins = stand_in_scores(parts, encoded, labels, validation, classes, folds=folds)
    scorer = CombinedScorer(parts).learn_weights(stand_ins)
    scorer.fit(encoded, labels)
    batch, _ = items(30, 13)
    centres, spreads = [], []
    for s in stand_ins:
        ordinary = s.scores[~s.novel].numpy()
        low, middle, high = np.quantile(ordinary, [0.16, 0.5, 0.84], axis=0)
        centres.append(middle)
        spreads.append((high - low) / 2)
    expected = sum(
        w * np.clip((p.score(batch).numpy() - m) / s, -8, 8)
        for w, p, m, s in zip(
            scorer.weights.values(), parts, np.mean(centres, 0), np.mean(spreads, 0), strict=True
        )
    )
    np.testing.assert_allclose(scorer.score(batch), expected, rtol=1e-6)
    assert sum(scorer.weights.values()) > 0


def test_a_combination_needs_parts_and_stand_ins_of_both_kinds() -> None:
    with pytest.raises(ConfigError, match="no parts"):
        CombinedScorer([])
    one_kind = StandIns(torch.zeros(4, 1), torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ShapeError, match="no fold"):
        CombinedScorer([Radius()]).learn_weights([one_kind])
    wrong = StandIns(torch.zeros(4, 2), torch.tensor([True, False, True, False]))
    with pytest.raises(ShapeError, match="each of the 1 parts"):
        CombinedScorer([Radius()]).learn_weights([wrong])

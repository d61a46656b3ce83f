"""pytorch-ood's detectors as scorers, and the linear head they share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hysafe.errors import ConfigError, MissingExtraError
from hysafe.evaluate.baselines import DETECTORS, LinearHead, PytorchOod, require_pytorch_ood
from hysafe.geometry import Points
from hysafe.score.novelty import Encoded

WIDTH = 300  # wider than ViM's largest subspace


def clusters(n: int, seed: int, *, novel: bool = False) -> tuple[Encoded, torch.Tensor]:
    """Four clusters, each with 30 dimensions of its own; novel items have none and are noisier."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    x = 2 * (torch.arange(WIDTH) // 30 == labels[:, None]).float() * (not novel)
    x = x + 0.5 * torch.randn(n, WIDTH, generator=g) * (1.4 if novel else 1)
    return Encoded(Points(torch.zeros(n, 2), 1.0), features=x), labels * 3


def test_the_head_is_a_multinomial_logistic_regression() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(300, 5, generator=g) * torch.tensor([1.0, 10, 0.1, 1, 3]) + 2
    y = (x[:, 0] > 2).long() * 4 + (x[:, 1] > 0).long()
    flip = torch.rand(300, generator=g) < 0.2
    y = torch.where(flip, y.roll(1), y)
    decay = 1e-2
    head = LinearHead(decay).fit(x, y)
    z = ((x - x.mean(0)) / x.std(0)).numpy()
    # its penalty is |W|²/2 to C times the sum of losses
    reference = LogisticRegression(C=1 / (2 * decay * 300), max_iter=2000, tol=1e-8).fit(z, y)
    logits = head.logits(x).detach()
    np.testing.assert_allclose(
        torch.softmax(logits, -1).numpy(), reference.predict_proba(z), atol=5e-3
    )
    assert head.accuracy(x, y) == pytest.approx(reference.score(z, y.numpy()), abs=0.01)


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_is_a_scorer_higher_for_novel(name: str) -> None:
    pytest.importorskip("pytorch_ood")
    known, labels = clusters(800, 2)  # more than dimensions: their Mahalanobis hardly shrinks
    for options in DETECTORS[name][1]:
        scorer = PytorchOod(name, options).fit(known, labels)
        inside = scorer.score(clusters(60, 3)[0])
        outside = scorer.score(clusters(60, 4, novel=True)[0])
        assert inside.dtype == torch.double
        assert float(outside.median()) > float(inside.median())


def test_logit_detectors_are_their_formulas() -> None:
    pytest.importorskip("pytorch_ood")
    known, labels = clusters(80, 5)
    heads: dict = {}
    scores = {
        n: PytorchOod(n, heads=heads).fit(known, labels).score(known)
        for n in ("MSP", "MaxLogit", "EnergyBased")
    }
    assert len(heads) == 1  # trained once for all three
    (head,) = heads.values()
    logits = head.logits(known.features)
    torch.testing.assert_close(scores["MSP"], -logits.softmax(-1).amax(-1).double())
    torch.testing.assert_close(scores["MaxLogit"], -logits.amax(-1).double())
    torch.testing.assert_close(scores["EnergyBased"], -logits.logsumexp(-1).double())
    # other items of the same labels have a head of their own
    PytorchOod("MSP", heads=heads).fit(clusters(80, 6)[0], labels)
    assert len(heads) == 2


def test_without_pytorch_ood_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_ood", None)
    monkeypatch.setitem(__import__("sys").modules, "pytorch_ood.detector", None)
    with pytest.raises(MissingExtraError, match=r"hysafe\[bench\]"):
        require_pytorch_ood()


def test_an_unknown_detector_is_refused() -> None:
    with pytest.raises(ConfigError, match="MSP"):
        PytorchOod("ODIN")

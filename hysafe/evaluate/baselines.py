"""The one file that imports pytorch-ood: its detectors as scorers, on the features of our tower.

All of them see the same features and, where they need logits, the same linear head, trained on the
same in-distribution items as our scorers are fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hysafe.errors import ConfigError, MissingExtraError
from hysafe.score.novelty import Encoded, NoveltyScorer

__all__ = ["DETECTORS", "LinearHead", "PytorchOod", "require_pytorch_ood"]

# Full-batch L-BFGS steps of the head: the loss no longer moves in its third digit.
HEAD_STEPS = 60

Score = Callable[[Tensor], Tensor]


class LinearHead:
    """Multinomial logistic regression on features.

    Args:
        decay: weight decay on standardised features.

    Attributes:
        weight [C, E], bias [C]: on the features as they are. classes: label of each row.
    """

    def __init__(self, decay: float = 1e-3) -> None:
        self.decay = decay
        self.weight, self.bias = torch.empty(0), torch.empty(0)
        self.classes = torch.empty(0)

    def fit(self, x: Tensor, labels: Tensor) -> LinearHead:
        """Train on features [B, E] with labels [B]."""
        self.classes, target = labels.unique(return_inverse=True)
        mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
        z = ((x - mean) / spread).float()
        weight = torch.zeros(len(self.classes), x.shape[1], requires_grad=True)
        bias = torch.zeros(len(self.classes), requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=HEAD_STEPS, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(z, weight, bias), target)
            loss = loss + self.decay * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        # on the features as they are, so that detectors that clip or project them can use it
        self.weight = (weight.detach() / spread).float()
        self.bias = (bias.detach() - self.weight @ mean).float()
        return self

    def logits(self, x: Tensor) -> Tensor:
        """[B, C]."""
        return F.linear(x.float(), self.weight, self.bias)

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """Share of right classes."""
        return float((self.classes[self.logits(x).argmax(-1)] == labels).double().mean())


def require_pytorch_ood() -> None:
    """Raise MissingExtraError where pytorch-ood is not installed."""
    try:
        import pytorch_ood.detector  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "the baselines of `eval novelty` need pytorch-ood: pip install 'hysafe[bench]'"
        ) from error


def _logit_score(detector: str) -> Callable[..., Score]:
    """A detector that needs no fit beyond the head."""

    def build(head: LinearHead, x: Tensor, y: Tensor) -> Score:
        import pytorch_ood.detector as library

        score = getattr(library, detector).score
        return lambda z: score(head.logits(z))

    return build


def _knn(head: LinearHead, x: Tensor, y: Tensor, k: int) -> Score:
    from pytorch_ood.detector import KNN

    return KNN(None, k=min(k, len(x))).fit_features(x, y).predict_features  # type: ignore[no-any-return]


def _mahalanobis(head: LinearHead, x: Tensor, y: Tensor) -> Score:
    from pytorch_ood.detector import Mahalanobis

    return Mahalanobis(None).fit_features(x, y).predict_features  # type: ignore[no-any-return]


def _vim(head: LinearHead, x: Tensor, y: Tensor, d: int) -> Score:
    from pytorch_ood.detector import ViM

    detector = ViM(None, d=d, w=head.weight, b=head.bias)
    return detector.fit_features(x, y).predict_features  # type: ignore[no-any-return]


def _react(head: LinearHead, x: Tensor, y: Tensor, percentile: float) -> Score:
    from pytorch_ood.detector import ReAct

    detector = ReAct(None, head.logits, percentile=percentile)
    return detector.fit_feature_maps(x, y).predict_feature_maps  # type: ignore[no-any-return]


#: name -> how to fit it, its settings (each tried on validation stand-ins), whether it needs a head
DETECTORS: Mapping[str, tuple[Callable[..., Score], Sequence[Mapping[str, Any]], bool]] = {
    "MSP": (_logit_score("MaxSoftmax"), ({},), True),
    "MaxLogit": (_logit_score("MaxLogit"), ({},), True),
    "EnergyBased": (_logit_score("EnergyBased"), ({},), True),
    "KNN": (_knn, ({"k": 1}, {"k": 10}, {"k": 50}), False),
    "Mahalanobis": (_mahalanobis, ({},), False),
    "ViM": (_vim, ({"d": 64}, {"d": 128}, {"d": 256}), True),
    "ReAct": (_react, ({"percentile": 0.9}, {"percentile": 0.99}), True),
}


@dataclass
class PytorchOod(NoveltyScorer):
    """A detector of pytorch-ood on the features.

    Args:
        detector: a key of :data:`DETECTORS`.
        options: its settings.
        decay: of the linear head.
        heads: heads trained already, by the number and sum of their labels and features; shared, so
            that detectors on the same items train one.
    """

    name: ClassVar[str] = "pytorch-ood"
    needs_labels: ClassVar[bool] = True
    detector: str
    options: Mapping[str, Any] = field(default_factory=dict)
    decay: float = 1e-3
    heads: dict[tuple[Any, ...], LinearHead] = field(default_factory=dict, repr=False)
    _fitted: Score | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise ConfigError(f"detector {self.detector!r}: known are {', '.join(DETECTORS)}.")

    def _fit(self, items: Encoded, labels: Tensor | None) -> None:
        require_pytorch_ood()
        assert labels is not None
        x = items.vectors("features").float()
        build, _, needs_head = DETECTORS[self.detector]
        head = self.head(x, labels) if needs_head else LinearHead()
        # contiguous classes, as some of the detectors want them
        self._fitted = build(head, x, labels.unique(return_inverse=True)[1], **self.options)

    def head(self, x: Tensor, labels: Tensor) -> LinearHead:
        """The linear head for these items, trained once."""
        key = (len(x), float(x.double().sum()), int(labels.sum()), self.decay)
        if key not in self.heads:
            self.heads[key] = LinearHead(self.decay).fit(x, labels)
        return self.heads[key]

    def _score(self, items: Encoded) -> Tensor:
        fitted = self._learned(self._fitted)
        return fitted(items.vectors("features").float()).detach()  # type: ignore[no-any-return]

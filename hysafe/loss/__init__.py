"""Losses: contrastive, entailment, presets of published recipes, the taxonomy objective."""

from hysafe.loss.contrastive import contrastive, prototype_cross_entropy, prototype_retrieval
from hysafe.loss.entailment import cone_negatives, entailment
from hysafe.loss.presets import PRESETS, Preset, preset_loss
from hysafe.loss.taxonomy import (
    TaxonomyWeights,
    candidate_cross_entropy,
    distillation,
    item_cones,
    node_cones,
)

__all__ = [
    "PRESETS",
    "Preset",
    "TaxonomyWeights",
    "candidate_cross_entropy",
    "cone_negatives",
    "contrastive",
    "distillation",
    "entailment",
    "item_cones",
    "node_cones",
    "preset_loss",
    "prototype_cross_entropy",
    "prototype_retrieval",
]

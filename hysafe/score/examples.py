"""Example texts of a node that a policy adds: by its words or by them, whichever finds them better.

Words place a node well where training knew its kind; of other kinds they know next to nothing, and the mean
of a few texts is far better. Which of the two it is the examples themselves tell: each is judged by the
others, and the cones of both are narrowed on the same ordinary items.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from hysafe.geometry import Points
from hysafe.score.calibration import ModalityCalibration
from hysafe.score.leaves import NodeTable, score_margins
from hysafe.score.reference import narrowing

__all__ = ["example_tangent"]


def example_tangent(
    row: int,
    examples: Tensor,
    ordinary: Tensor,
    apexes: Points,
    table: NodeTable,
    new: Tensor,
    fit: ModalityCalibration,
    *,
    scale: float,
) -> Tensor | None:
    """Tangent vector [D] of a node's apex towards the mean of its example texts; None where the apex as its
    words place it finds them better, or where they are one text in other capitals.

    What is compared is the mean score of the examples (of a harmless leaf, its share among all leaves), each
    judged by a cone that points to the mean of the others, or by that of the words. The radius is that of
    the node's depth.

    Args:
        row: of the node in the table. examples: tangent vectors of its texts [n, D].
        ordinary: tangent vectors of ordinary texts [m, D]; with few or none nothing is narrowed.
        apexes: of all nodes as their words place them [N, D].
        table: of a view in which all nodes are on: what a node means does not hang on its status.
        new: bool [L], leaves of the table that the model does not know.
        fit: calibration of texts. scale: inverse temperature of margins.
    """
    examples = examples.double().unique(dim=0)
    if len(examples) < 2:
        return None
    apexes = Points(apexes.space.double(), apexes.c, apexes.geometry)
    radius = apexes.tangent()[row].norm()

    def towards(directions: Tensor) -> Points:
        return Points.from_tangent(
            F.normalize(directions, dim=-1) * radius, apexes.c, apexes.geometry
        )

    units = F.normalize(examples, dim=-1)
    total = units.sum(0)
    known = Points.from_tangent(ordinary.double(), apexes.c, apexes.geometry)
    asked = Points.from_tangent(examples, apexes.c, apexes.geometry)
    ordinary_margins, margins = known.margin(apexes), asked.margin(apexes)
    others = asked.margin(towards(total - units)).diagonal()
    told = known.margin(towards(total[None]))[:, 0]

    harmless = ((table.leaves == row) & ~table.risk).nonzero()

    def found(of_ordinary: Tensor, of_examples: Tensor) -> float:
        ordinary_margins[:, row], margins[:, row] = of_ordinary, of_examples
        judged = margins - narrowing(ordinary_margins, table, new, fit, scale=scale)
        if len(harmless):
            shares = (judged[:, table.leaves] * scale).softmax(1)
            return float(shares[:, harmless[0, 0]].mean())
        scores = score_margins(
            judged, table, scale=scale, slope=fit.slope, offset=fit.offset,
            temperature=fit.temperature,
        )  # fmt: skip
        return float(scores.nodes[:, row].mean())

    by_words = found(ordinary_margins[:, row].clone(), margins[:, row].clone())
    if found(told, others) <= by_words:
        return None
    return towards(total[None]).tangent()[0]

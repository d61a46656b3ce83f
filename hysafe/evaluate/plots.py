"""Plots of the card and of the novelty tables: each one an SVG and a PNG. Needs the extra ``plots``.

The same data give the same SVG: no dates, no random ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hysafe.errors import MissingExtraError
from hysafe.evaluate.curves import FPR_GRID, Reliability, RiskCoverage

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "plot_radius",
    "plot_reliability",
    "plot_risk_coverage",
    "plot_roc",
    "require_matplotlib",
]

FORMATS = ("svg", "png")
STYLE = {
    "svg.hashsalt": "hysafe", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False,
    "figure.dpi": 150,
}  # fmt: skip
# Okabe and Ito's colours, told apart by all kinds of eyes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PANEL = 3.6  # inches
# Columns of a page of panels.
ACROSS = 3
# Spread of the dots of one depth, in depths.
JITTER = 0.12


def require_matplotlib() -> None:
    """Raise MissingExtraError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install 'hysafe[plots]'") from error


def plot_reliability(path: Path, panels: Mapping[str, Mapping[str, Reliability]]) -> list[Path]:
    """Share of true items against probability, in adaptive bins; the diagonal is calibrated.

    Args:
        path: without suffix; folders are made. panels: title -> name -> curve.

    Returns:
        the files written: ``PATH.svg`` and ``PATH.png``.
    """
    with _figure(path, len(panels)) as (axes, written):
        for ax, (title, series) in zip(axes, panels.items(), strict=True):
            ax.plot((0, 1), (0, 1), color="#888888", linewidth=0.8, linestyle="--")
            for (name, bins), color in zip(series.items(), _colors(series), strict=True):
                ax.plot(bins.confidence, bins.frequency, marker="o", markersize=3.5, color=color,
                        label=f"{name}, ECE {bins.error:.3f}")  # fmt: skip
            ax.set(title=title, xlabel="probability", ylabel="share that is unsafe",
                   xlim=(0, 1), ylim=(0, 1), aspect="equal")  # fmt: skip
            ax.legend(loc="upper left", fontsize=7.5)
    return written


def plot_risk_coverage(path: Path, panels: Mapping[str, Mapping[str, RiskCoverage]]) -> list[Path]:
    """Error rate on the most confident share of items; arguments as in :func:`plot_reliability`."""
    with _figure(path, len(panels)) as (axes, written):
        for ax, (title, series) in zip(axes, panels.items(), strict=True):
            for (name, curve), color in zip(series.items(), _colors(series), strict=True):
                ax.plot(curve.coverage, curve.risk, color=color,
                        label=f"{name}, area {curve.area:.4f}")  # fmt: skip
            ax.set(title=title, xlabel="share decided, the rest to review",
                   ylabel="error rate of what is decided", xlim=(0, 1))  # fmt: skip
            ax.set_ylim(bottom=0)
            ax.legend(loc="upper left", fontsize=7.5)
    return written


def plot_radius(
    path: Path, nodes: Mapping[str, Sequence[tuple[int, Tensor]]], items: Mapping[str, Tensor]
) -> list[Path]:
    """Geodesic radius of nodes by depth, and of items beside them.

    Args:
        nodes: kind -> (depth, radii) of its nodes. items: name -> radii.
    """
    with _figure(path, 1, width=1.8) as (axes, written):
        (ax,) = axes
        depths = sorted({depth for rows in nodes.values() for depth, _ in rows})
        generator = torch.Generator().manual_seed(0)
        for n, ((kind, rows), color) in enumerate(zip(nodes.items(), _colors(nodes), strict=True)):
            side = (n - (len(nodes) - 1) / 2) * 3 * JITTER  # kinds stand side by side
            for k, (depth, radii) in enumerate(rows):
                away = side + (torch.rand(len(radii), generator=generator) - 0.5) * 2 * JITTER
                ax.scatter(depths.index(depth) + away, radii, s=9, color=color, alpha=0.6,
                           linewidths=0, label=kind if k == 0 else None)  # fmt: skip
        start = len(depths)
        if items:
            ax.boxplot(
                [r.tolist() for r in items.values()], positions=range(start, start + len(items)),
                widths=0.5, showfliers=False, medianprops={"color": COLORS[1]},
            )  # fmt: skip
        names = [f"depth {d}" for d in depths] + list(items)
        ax.set_xticks(range(len(names)), [n.replace(" ", "\n", 1) for n in names])
        ax.set(ylabel="geodesic radius", xlim=(-0.6, len(names) - 0.4))
        ax.set_ylim(bottom=0)
        ax.legend(loc="upper left", fontsize=7.5)
    return written


def plot_roc(path: Path, panels: Mapping[str, Mapping[str, tuple[Tensor, float]]]) -> list[Path]:
    """ROC curves.

    Args:
        panels: title -> name -> (true-positive rates at :data:`FPR_GRID`, AUROC).
    """
    with _figure(path, len(panels)) as (axes, written):
        for ax, (title, series) in zip(axes, panels.items(), strict=True):
            ax.plot((0, 1), (0, 1), color="#888888", linewidth=0.8, linestyle="--")
            for (name, (rates, area)), color in zip(series.items(), _colors(series), strict=True):
                ax.plot(FPR_GRID, rates, color=color, label=f"{name}, {area:.3f}")
            ax.set(title=title, xlabel="known items called novel", ylabel="novel items found",
                   xlim=(0, 1), ylim=(0, 1.01), aspect="equal")  # fmt: skip
            ax.legend(loc="lower right", fontsize=7)
    return written


@contextmanager
def _figure(
    path: Path, panels: int, *, width: float = 1.0
) -> Iterator[tuple[list[Any], list[Path]]]:
    """Axes of a row of panels and the list of files, written when the body is done."""
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written: list[Path] = []
    across = max(1, min(panels, ACROSS))
    down = -(-panels // across)
    with matplotlib.rc_context(dict[Any, Any](STYLE)):
        figure = Figure(figsize=(PANEL * across * width, PANEL * down), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(down, across, squeeze=False).ravel().tolist()
        for unused in grid[panels:]:
            unused.set_axis_off()
        yield grid[:panels], written
        path.parent.mkdir(parents=True, exist_ok=True)
        for form in FORMATS:
            file = path.with_name(f"{path.name}.{form}")
            figure.savefig(file, metadata={"Date": None} if form == "svg" else None)
            written.append(file)


def _colors(series: Mapping[str, Any]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(series))]

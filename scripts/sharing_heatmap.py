"""Draws which experts each task uses: TaskExpert's mean routing weights on held-out rows, task by expert."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sharing_results import Comparison

WIDTH_INCHES = 5.6
ROW_INCHES = 0.42
DOTS_PER_INCH = 110


def draw_routing(found: Sequence[Comparison], path: Path) -> None:
    """Writes a PNG, a panel per table, of its first seed: experts of two seeds have nothing in common."""
    # Imported here, without pyplot: matplotlib is only needed to draw, and pyplot would look for a screen.
    from matplotlib.figure import Figure

    panels = [(each.table, list(each.measures), _first_routing(each)) for each in found]
    heights = [len(tasks) * ROW_INCHES + 0.9 for _, tasks, _ in panels]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights)), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    # Twice the even share, if no weight is larger: small departures from it shall not look like large ones.
    darkest = max(max(float(weights.max()), 2 / weights.shape[1]) for _, _, weights in panels)
    for axis, (table, tasks, weights) in zip(axes, panels, strict=True):
        axis.imshow(weights, cmap="Blues", vmin=0, vmax=darkest, aspect="auto")
        axis.set_title(f"{table}: mean routing weight (1/K = {1 / weights.shape[1]:.2f})", fontsize=10)
        axis.set_xticks(
            range(weights.shape[1]), [f"expert {k + 1}" for k in range(weights.shape[1])], fontsize=8
        )
        axis.set_yticks(range(len(tasks)), tasks, fontsize=9)
        for (row, column), weight in np.ndenumerate(weights):
            color = "white" if weight > 0.6 * darkest else "black"
            axis.text(column, row, f"{weight:.2f}", ha="center", va="center", color=color, fontsize=9)
    figure.savefig(path)


def _first_routing(found: Comparison) -> NDArray[np.float64]:
    """(T, K)"""
    return np.array(next(run.routing for run in found.runs if run.routing is not None))

"""What a variant of lower precision gained and lost, in rows for a table; the terminal and report.md show the
same.
"""

from __future__ import annotations

from collections.abc import Iterator

from te_runtime.manifest import AccuracyMetric, TaskAccuracy, Variant

__all__ = ["ACCURACY_HEADINGS", "METRICS", "accuracy_rows"]

ACCURACY_HEADINGS = ("task", "loss", "allowed", "on labels", "arg-max agreement", "routing KL", "top expert")
METRICS: dict[AccuracyMetric, str] = {
    "accuracy": "points of accuracy on the labels",
    "area under the ROC curve": "points of the area under the ROC curve on the labels",
    "R2": "points of R² on the labels",
    "agreement": "points of rows whose arg-max is not the oracle's",
    "relative error": "points of the oracle's variance left unexplained",
}


def accuracy_rows(variant: Variant) -> Iterator[tuple[str, ...]]:
    """A row per task: what it lost, what it may lose, and how its answers compare with the oracle's."""
    for entry in variant.accuracy:
        yield (
            entry.task,
            f"{entry.loss_points:.2f}",
            f"{entry.budget_points:g}",
            _before_after(entry),
            _share(entry.agreement),
            "-" if entry.routing_kl is None else f"{entry.routing_kl:.1e}",
            _share(entry.top_expert_agreement),
        )


def _before_after(entry: TaskAccuracy) -> str:
    if entry.oracle_percent is None or entry.variant_percent is None:
        return "-"
    return f"{entry.oracle_percent:.2f} to {entry.variant_percent:.2f}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"

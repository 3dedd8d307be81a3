"""What a variant of lower precision gained and lost, in rows for a table; the terminal and report.md show the
same.
"""

from __future__ import annotations

from te_runtime.manifest import AccuracyMetric, TaskAccuracy, Variant

__all__ = ["accuracy_table", "judged_rows", "loss_meaning"]

_HEADINGS = ("task", "loss", "on labels", "arg-max", "routing KL", "top expert")
_METRICS: dict[AccuracyMetric, str] = {
    "accuracy": "points of accuracy on the labels",
    "area under the ROC curve": "points of the area under the ROC curve on the labels",
    "R2": "points of R² on the labels",
    "agreement": "points of rows whose arg-max is not the oracle's",
    "relative error": "points of the oracle's variance left unexplained",
}
_NOTHING = "-"


def accuracy_table(variant: Variant) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings, and a row per task: what it lost, and how its answers compare with the oracle's.

    What no task has, such as a figure on labels where there are none, is left out.
    """
    rows = [_row(entry) for entry in variant.accuracy]
    shown = [place for place in range(len(_HEADINGS)) if any(row[place] != _NOTHING for row in rows)]
    return tuple(_HEADINGS[place] for place in shown), [tuple(row[place] for place in shown) for row in rows]


def judged_rows(variant: Variant) -> str:
    """`718 rows of calibration data`."""
    first = variant.accuracy[0]
    return f"{first.rows} {first.source if first.source == 'probe rows' else f'rows of {first.source}'}"


def loss_meaning(variant: Variant) -> str:
    """What the losses of a variant count, and how much is allowed."""
    kinds = dict.fromkeys(_METRICS[entry.metric] for entry in variant.accuracy)
    return f"{' or '.join(kinds)}; {variant.accuracy[0].budget_points:g} allowed"


def _row(entry: TaskAccuracy) -> tuple[str, ...]:
    return (
        entry.task,
        f"{entry.loss_points:.2f}",
        _before_after(entry),
        _share(entry.agreement),
        _NOTHING if entry.routing_kl is None else f"{entry.routing_kl:.1e}",
        _share(entry.top_expert_agreement),
    )


def _before_after(entry: TaskAccuracy) -> str:
    if entry.oracle_percent is None or entry.variant_percent is None:
        return _NOTHING
    return f"{entry.oracle_percent:.2f} to {entry.variant_percent:.2f}"


def _share(share: float | None) -> str:
    return _NOTHING if share is None else f"{share:.2%}"

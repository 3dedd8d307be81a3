"""What the manifest says of one task's accuracy."""

from __future__ import annotations

from te_export.precision.accuracy import TaskAccuracy as Figures
from te_export.precision.evaluation import Evaluation
from te_runtime.manifest import AccuracyMetric, TaskAccuracy

__all__ = ["accuracy_entry"]


def accuracy_entry(task: str, figures: Figures, evaluation: Evaluation) -> TaskAccuracy:
    """The entry for a task that `evaluation` measured."""
    return TaskAccuracy(
        task=task,
        source=evaluation.source,
        rows=figures.rows,
        metric=_metric(figures, evaluation),
        loss_points=evaluation.loss_points(figures),
        budget_points=evaluation.budget_points,
        oracle_percent=figures.before,
        variant_percent=figures.after,
        agreement=figures.agreement,
        relative_error=figures.relative_error,
        routing_kl=figures.routing_kl,
        top_expert_agreement=figures.top_expert_agreement,
    )


def _metric(figures: Figures, evaluation: Evaluation) -> AccuracyMetric:
    """What Evaluation.loss_points counts."""
    if evaluation.source == "probe rows":
        return "relative error"
    return "R2" if figures.metric == "R²" else figures.metric

"""What a task loses in a variant, against the float64 oracle: one number for the budget, and the figures beside it.

With labels the budget holds the loss of real quality: points of accuracy for classes, of the area under the ROC
curve for one output with labels 0 and 1, of R² for other values. Without labels the oracle is the truth: every
row whose arg-max differs costs as one wrong answer, and one output alone is judged by the variance it no longer
explains. N rows, K experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from te_export.capture.joint_graph import EXPERT_FEATURES, prediction_name, routing_weights_name
from te_export.models.exportable import ExportableModel
from te_export.models.input_rows import InputRows
from te_export.precision.calibration_data import Labels
from te_export.verify.oracle import UNIT_ROUNDOFF, evaluate_float64

__all__ = [
    "JudgedBy",
    "Metric",
    "TaskAccuracy",
    "TaskOracle",
    "doubt_labels",
    "evaluate_oracle",
    "measure_accuracy",
]

JudgedBy = Literal["labels", "agreement", "relative error"]
Metric = Literal["accuracy", "area under the ROC curve", "R²", "agreement", "relative error"]

_MOST_ROWS = 1024
_VALUES_AT_ONCE = 2**23
_JUDGED_BY: dict[Metric, JudgedBy] = {"agreement": "agreement", "relative error": "relative error"}
_SMALLEST_WEIGHT = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class TaskOracle:
    """What the oracle answers for one task, and the truth where it is known.

    Attributes:
        prediction: (N, out) float64.
        routing_weights: (N, K) float64; None where the task has no gate.
        labels: as CalibrationData.labels, of the same rows; None without.
    """

    prediction: NDArray[np.float64]
    routing_weights: NDArray[np.float64] | None
    labels: Labels | None


@dataclass(frozen=True)
class TaskAccuracy:
    """How one task fares in one variant.

    Attributes:
        rows: N, how many rows were judged. One row is worth 100 / N points of accuracy or agreement.
        judged_by: what `drop_points` is made of.
        metric: which figure it is the loss of.
        before, after: `metric` of the oracle and of the variant on the labels, in percent; None without labels,
            `after` also where an output is not finite.
        baseline: `metric` of an answer that ignores its input (the most frequent class; 50; 0), in percent.
            Labels on which `before` is no better cannot tell a good variant from a broken one. None without.
        drop_points: what the budget is held against. Negative where the variant is better; infinite, and so
            above any budget, where an output, of the oracle's even, is NaN or infinite.
        agreement: fraction of rows whose arg-max is the oracle's; None for a task with one output.
        relative_error: squared error over the squared deviation of the oracle from its mean, summed over all
            rows and outputs.
        routing_kl: mean over rows of KL(oracle || variant) of the routing weights, in nats.
        top_expert_agreement: fraction of rows whose largest routing weight is the oracle's. As routing_kl, None
            where there are no routing weights.
    """

    rows: int
    judged_by: JudgedBy
    metric: Metric
    before: float | None
    after: float | None
    baseline: float | None
    drop_points: float
    agreement: float | None
    relative_error: float
    routing_kl: float | None
    top_expert_agreement: float | None


@dataclass(frozen=True)
class _Loss:
    """What TaskAccuracy says under the same names, before outputs that are not finite are looked at."""

    metric: Metric
    drop_points: float
    before: float | None = None
    after: float | None = None
    baseline: float | None = None


def evaluate_oracle(
    model: ExportableModel, x: InputRows, labels: Mapping[str, Labels] | None = None
) -> dict[str, TaskOracle]:
    """Run the oracle over rows, so many at a time that what lies between input and output stays small.

    Args:
        model: the torch model.
        x: N rows.
        labels: of the same rows, by task name.

    Returns:
        By task name, in the order of the export.
    """
    known = labels or {}
    features = model.expert_features
    width = sum(spec.size for spec in model.inputs)
    width += 4 * (width if features is None else features.num_experts * features.expert_dim)
    step = max(1, min(_MOST_ROWS, _VALUES_AT_ONCE // width))
    parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in model.output_names}
    for start in range(0, len(x), step):
        found = evaluate_float64(model.module, x[start : start + step])
        for name, output in zip(parts, found, strict=True):
            if name != EXPERT_FEATURES:
                parts[name].append(output)
    outputs = {name: np.concatenate(columns) for name, columns in parts.items() if columns}
    return {
        name: TaskOracle(
            prediction=outputs[prediction_name(name)],
            routing_weights=outputs.get(routing_weights_name(name)),
            labels=known.get(name),
        )
        for name in model.task_names
    }


def measure_accuracy(
    oracle: TaskOracle, prediction: NDArray[np.generic], routing_weights: NDArray[np.generic] | None
) -> TaskAccuracy:
    """Measure a variant's answers for one task.

    Args:
        oracle: of the same rows.
        prediction: (N, out), or a map (N, …) for each row, of any floating dtype.
        routing_weights: (N, K), None exactly where the oracle has none.

    Raises:
        ValueError: shapes are not the oracle's, or the labels cannot judge, as CalibrationData's can.
    """
    found = _same_shape(prediction, oracle.prediction, "prediction")
    routing = _routing_pair(routing_weights, oracle.routing_weights)
    is_finite = all(np.isfinite(array).all() for array in (found, oracle.prediction, *(routing or ())))
    loss = _loss_against_oracle if oracle.labels is None else partial(_loss_on_labels, oracle.labels)
    lost = loss(oracle.prediction, found)
    rows = len(found)
    return TaskAccuracy(
        rows=rows,
        judged_by=_JUDGED_BY.get(lost.metric, "labels"),
        metric=lost.metric,
        before=lost.before,
        after=lost.after if is_finite else None,
        baseline=lost.baseline,
        drop_points=lost.drop_points if is_finite and not math.isnan(lost.drop_points) else math.inf,
        agreement=_agreeing_rows(found, oracle.prediction) / rows if _has_classes(found) else None,
        relative_error=_relative_error(found, oracle.prediction),
        routing_kl=None if routing is None else _divergence(*routing),
        top_expert_agreement=None if routing is None else _agreeing_rows(*routing) / rows,
    )


def doubt_labels(task: str, found: TaskAccuracy, judged: str) -> str:
    """What to say of labels on which the model itself is no better than an answer that ignores its input.

    Args:
        judged: what they were to judge.

    Returns:
        One sentence or two; empty where there is nothing to say.
    """
    if found.before is None or found.baseline is None or found.before > found.baseline:
        return ""
    return (
        f"labels.{task} cannot judge {judged}: {found.metric} of the model itself is {found.before:.1f}, no better "
        f"than {found.baseline:.1f} for an answer that ignores its input. Are they this task's labels, in the order "
        "of the rows?"
    )


def _routing_pair(
    found: NDArray[np.generic] | None, exact: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    if found is None and exact is None:
        return None
    if found is None or exact is None:
        raise ValueError("routing weights: the oracle and the variant must both have them, or neither")
    return _same_shape(found, exact, "routing weights"), exact


def _same_shape(found: NDArray[np.generic], expected: NDArray[np.float64], what: str) -> NDArray[np.float64]:
    if found.shape != expected.shape or not expected.size:
        raise ValueError(f"{what}: got shape {found.shape}, expected {expected.shape} with at least one row")
    return found.astype(np.float64)


def _agreeing_rows(found: NDArray[np.float64], exact: NDArray[np.float64]) -> int:
    """How many rows have the same arg-max; a row that is not finite has none."""
    finite = np.isfinite(found).all(axis=1)
    return int(np.count_nonzero(finite & (found.argmax(axis=1) == exact.argmax(axis=1))))


def _relative_error(found: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    """The unexplained part of the oracle's variance; infinite where an output is not finite.

    An oracle that varies by no more than float32 rounds off has no variance to explain: errors are then held
    against its size. If that is 0 as well, no error is 0 and any error is infinite.
    """
    if not np.isfinite(found).all():
        return math.inf
    with np.errstate(over="ignore", invalid="ignore"):
        error = float(np.square(found - exact).sum())
        size = float(np.square(exact).sum())
        deviation = float(np.square(exact - exact.mean(axis=0)).sum())
        scale = deviation if deviation > UNIT_ROUNDOFF**2 * size else size
    if error == 0:
        return 0.0
    ratio = error / scale if scale > 0 else math.inf
    return math.inf if math.isnan(ratio) else ratio


def _divergence(found: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    """Mean of Σ_k p·log(p / q) - p + q, the divergence that is never negative; for weights that sum to 1 it is KL.

    Weights below float32's smallest normal number count as that, so that one which the variant rounds to 0 costs
    much and not without end.
    """
    if not (np.isfinite(found).all() and np.isfinite(exact).all()):
        return math.inf
    p, q = (np.maximum(weights, _SMALLEST_WEIGHT) for weights in (exact, found))
    return max(0.0, float((p * (np.log(p) - np.log(q)) - p + q).sum(axis=1).mean()))


def _has_classes(prediction: NDArray[np.float64]) -> bool:
    """Whether a row has several numbers to take an arg-max of: not one, and not a map of them."""
    return prediction.ndim == 2 and prediction.shape[1] > 1


def _loss_against_oracle(exact: NDArray[np.float64], found: NDArray[np.float64]) -> _Loss:
    rows = len(found)
    if not _has_classes(found):
        return _Loss("relative error", drop_points=100 * _relative_error(found, exact))
    return _Loss("agreement", drop_points=100 * (rows - _agreeing_rows(found, exact)) / rows)


def _loss_on_labels(labels: Labels, exact: NDArray[np.float64], found: NDArray[np.float64]) -> _Loss:
    if len(labels) != len(exact):
        raise ValueError(f"labels: got {len(labels)} rows, expected {len(exact)}")
    if labels.ndim == 1:
        return _accuracy_loss(cast("NDArray[np.int64]", labels), exact, found)
    values = labels.astype(np.float64)
    if values.shape[1] == 1 and bool(((values == 0) | (values == 1)).all()):
        return _area_loss(values[:, 0] == 1, exact[:, 0], found[:, 0])
    return _r_squared_loss(values, exact, found)


def _accuracy_loss(
    labels: NDArray[np.int64], exact: NDArray[np.float64], found: NDArray[np.float64]
) -> _Loss:
    """Counts are subtracted before they are divided: a loss of exactly the budget is within it."""
    rows = len(labels)
    before, after = (
        int(np.count_nonzero(np.isfinite(answers).all(axis=1) & (answers.argmax(axis=1) == labels)))
        for answers in (exact, found)
    )
    return _Loss(
        metric="accuracy",
        before=100 * before / rows,
        after=100 * after / rows,
        baseline=100 * int(np.bincount(labels).max()) / rows,
        drop_points=100 * (before - after) / rows,
    )


def _area_loss(
    is_positive: NDArray[np.bool_], exact: NDArray[np.float64], found: NDArray[np.float64]
) -> _Loss:
    positives = int(np.count_nonzero(is_positive))
    pairs = positives * (len(is_positive) - positives)
    if not pairs:
        raise ValueError("labels: one class alone, expected both 0 and 1")
    before, after = (_ordered_pairs(is_positive, scores) for scores in (exact, found))
    return _Loss(
        metric="area under the ROC curve",
        before=100 * before / pairs,
        after=100 * after / pairs,
        baseline=50.0,
        drop_points=100 * (before - after) / pairs,
    )


def _ordered_pairs(is_positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """Pairs of a positive and a negative row in which the positive scores higher; equal scores count half.

    The Mann-Whitney statistic, from the sum of the positives' ranks.
    """
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2
    positives = int(np.count_nonzero(is_positive))
    return float(mean_ranks[place][is_positive].sum()) - positives * (positives + 1) / 2


def _r_squared_loss(
    values: NDArray[np.float64], exact: NDArray[np.float64], found: NDArray[np.float64]
) -> _Loss:
    """R² over all outputs: 1 - Σ (value - answer)² / Σ (value - mean of its output)²."""
    with np.errstate(over="ignore", invalid="ignore"):
        before, after = (float(np.square(values - answers).sum()) for answers in (exact, found))
        total = float(np.square(values - values.mean(axis=0)).sum())
    if not total > 0:
        raise ValueError("labels: all alike, expected values that differ")
    return _Loss(
        metric="R²",
        before=100 * (1 - before / total),
        after=100 * (1 - after / total),
        baseline=0.0,
        drop_points=100 * (after - before) / total,
    )

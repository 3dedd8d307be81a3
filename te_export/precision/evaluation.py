"""What a variant is judged on: rows with the oracle's answers, and the joint graph's answers to the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from te_export.capture.joint_graph import prediction_name, routing_weights_name
from te_export.models.input_rows import InputRows
from te_export.precision.accuracy import TaskAccuracy, TaskOracle, measure_accuracy
from te_export.verify.probe_rows import ORDINARY
from te_export.verify.references import References
from te_runtime.session_types import Session

__all__ = ["MOST_UNEXPLAINED_POINTS", "Evaluation", "first_rows", "predictions_of", "probe_evaluation"]

MOST_UNEXPLAINED_POINTS = 10.0
"""What a variant may lose without data: a tenth of the variance of a task's prediction over random rows."""
_BATCH = 64


@dataclass(frozen=True)
class Evaluation:
    """Rows to judge a variant on.

    Attributes:
        source: `calibration data`, the judged half of what the user gave, or `probe rows`, random ones.
        x: N rows.
        tasks: the oracle's answers to them, and the labels where there are any.
        budget_points: how much each task may lose: percentage points of what `TaskAccuracy.judged_by` says
            with data, of unexplained variance without.
        calibration: other rows of the data to take ranges from; None without data.
    """

    source: Literal["calibration data", "probe rows"]
    x: InputRows
    tasks: Mapping[str, TaskOracle]
    budget_points: float
    calibration: InputRows | None = None

    def measure(self, joint: Session) -> dict[str, TaskAccuracy]:
        """Run a joint graph over the rows; by task, how it compares with the oracle.

        Raises:
            BundleError: onnxruntime gave up.
        """
        names = [spec.name for spec in joint.spec.inputs]
        parts = [
            joint.run(self.x[start : start + _BATCH].feeds(names)) for start in range(0, len(self.x), _BATCH)
        ]
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        outputs = dict(zip((spec.name for spec in joint.spec.outputs), columns, strict=True))
        return {
            task: measure_accuracy(oracle, *predictions_of(task, outputs))
            for task, oracle in self.tasks.items()
        }

    def measure_task(
        self, task: str, answer: Callable[[InputRows], Sequence[NDArray[np.generic]]]
    ) -> TaskAccuracy:
        """How one task compares with the oracle.

        Args:
            answer: gives prediction and routing weights for some rows.
        """
        parts = [answer(self.x[start : start + _BATCH]) for start in range(0, len(self.x), _BATCH)]
        prediction, routing_weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        return measure_accuracy(self.tasks[task], prediction, routing_weights)

    def loss_points(self, figures: TaskAccuracy) -> float:
        """What a task lost, to be held against the budget; infinite where an output is not finite."""
        if self.source == "calibration data":
            return figures.drop_points
        return 100.0 * figures.relative_error

    def misses(self, figures: Mapping[str, TaskAccuracy]) -> tuple[str, ...]:
        """The tasks that lost more than the budget."""
        return tuple(
            task for task, found in figures.items() if not self.loss_points(found) <= self.budget_points
        )


def predictions_of(
    task: str, outputs: Mapping[str, NDArray[np.generic]]
) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    """Prediction of a task among a joint graph's outputs, and routing weights where it has a gate."""
    return outputs[prediction_name(task)], outputs.get(routing_weights_name(task))


def first_rows(evaluation: Evaluation, rows: int) -> Evaluation:
    """The same over its first rows alone, without labels."""
    tasks = {
        name: TaskOracle(
            prediction=oracle.prediction[:rows],
            routing_weights=None if oracle.routing_weights is None else oracle.routing_weights[:rows],
            labels=None,
        )
        for name, oracle in evaluation.tasks.items()
    }
    return replace(evaluation, x=evaluation.x[:rows], tasks=tasks)


def probe_evaluation(references: References) -> Evaluation:
    """The ordinary probe rows, for exports without data: they can tell a broken variant, not its accuracy."""
    start, stop = next((start, stop) for name, start, stop in references.rows.groups if name == ORDINARY)
    return Evaluation(
        source="probe rows",
        x=references.rows.x[start:stop],
        tasks={
            name: TaskOracle(
                prediction=task.prediction.oracle[start:stop],
                routing_weights=None
                if task.routing_weights is None
                else task.routing_weights.oracle[start:stop],
                labels=None,
            )
            for name, task in references.tasks.items()
        },
        budget_points=MOST_UNEXPLAINED_POINTS,
    )

"""What every graph is compared with: the oracle's outputs, and torch float32's own, on the same rows in the
same
batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from te_export.capture.joint_graph import EXPERT_FEATURES, prediction_name, routing_weights_name
from te_export.models.exportable import ExportableModel
from te_export.partition import PREDICTION, ROUTING_WEIGHTS
from te_export.verify.batches import plan_batches
from te_export.verify.oracle import evaluate_float32, evaluate_float64, evaluate_with_rounding_noise
from te_export.verify.probe_rows import ORDINARY, ProbeRows
from te_runtime.manifest import TaskUtilization

__all__ = ["OutputReference", "References", "TaskReference", "evaluate_references", "utilization"]

_DRAWS = 2
_DRAWS_OFF_THE_ORDINARY = 16
_DRAWS_OF_LARGE_MODELS = 4
_LARGE_BYTES = 2**28
_MANY_MULTIPLY_ADDS = 10**7


@dataclass(frozen=True)
class OutputReference:
    """One output, by the oracle and by torch.

    Attributes:
        oracle: (N, …) float64, over the probe rows.
        torch: (M, …) float32, over the concatenated batches that every graph is run in.
        noise: (N, …) float64, the largest deviation from the oracle that simulated float32 rounding caused.
    """

    oracle: NDArray[np.float64]
    torch: NDArray[np.float32]
    noise: NDArray[np.float64]


@dataclass(frozen=True)
class TaskReference:
    """prediction (N, …), and routing weights (N, K) of a task that has a gate."""

    prediction: OutputReference
    routing_weights: OutputReference | None

    @property
    def outputs(self) -> dict[str, OutputReference]:
        """By the name that the output has in the task's own graph."""
        weights = {} if self.routing_weights is None else {ROUTING_WEIGHTS: self.routing_weights}
        return {PREDICTION: self.prediction, **weights}


@dataclass(frozen=True)
class References:
    """Everything a graph may put out.

    Attributes:
        indices: (M,) probe row of each row of the concatenated batches; the first N are 0, 1, …, N - 1.
        expert_features: (N, K, D), the trunk's output; None where the family has no such value.
        tasks: by task name, in the order of the export.
    """

    rows: ProbeRows
    indices: NDArray[np.int64]
    expert_features: OutputReference | None
    tasks: dict[str, TaskReference]


def evaluate_references(model: ExportableModel, rows: ProbeRows) -> References:
    """Run the oracle, simulated rounding, and torch float32 over the rows."""
    planned = plan_batches(len(rows))
    oracle = evaluate_float64(model.module, rows.x)
    noise = _draw_noise(model, rows, oracle)
    single = evaluate_float32(model.module, rows.x, planned)
    references = (OutputReference(*columns) for columns in zip(oracle, single, noise, strict=True))
    outputs = dict(zip(model.output_names, references, strict=True))
    return References(
        rows=rows,
        indices=np.concatenate(planned),
        expert_features=outputs.get(EXPERT_FEATURES),
        tasks={
            name: TaskReference(outputs[prediction_name(name)], outputs.get(routing_weights_name(name)))
            for name in model.task_names
        },
    )


def _draw_noise(
    model: ExportableModel, rows: ProbeRows, oracle: Sequence[NDArray[np.float64]]
) -> list[NDArray[np.float64]]:
    """The largest deviation from the oracle over all draws of simulated rounding, for each output.

    Among large and routing rows one near a tie between experts decides for its whole group, and multiplies
    whatever a draw happens to be there: two draws were seen to be a fifth of what onnxruntime and torch alike
    make of such a row, sixteen are not.
    """
    noise = [np.zeros_like(exact) for exact in oracle]
    ordinary = next(stop for name, _, stop in rows.groups if name == ORDINARY)
    is_large = model.row_cost_bytes > _LARGE_BYTES or model.multiply_adds > _MANY_MULTIPLY_ADDS
    for seed in range(1, 1 + (_DRAWS_OF_LARGE_MODELS if is_large else _DRAWS_OFF_THE_ORDINARY)):
        start = 0 if seed <= _DRAWS else ordinary
        if start == len(rows):
            break
        noisy = evaluate_with_rounding_noise(model.module, rows.x[start:], seed)
        for largest, exact, found in zip(noise, oracle, noisy, strict=True):
            np.maximum(largest[start:], np.abs(found - exact[start:]), out=largest[start:])
    return noise


def utilization(references: References) -> tuple[TaskUtilization, ...]:
    """How far the rows exercised the routing of each task that has a gate, by the oracle."""
    return tuple(
        _task_utilization(name, task.routing_weights.oracle, references.rows)
        for name, task in references.tasks.items()
        if task.routing_weights is not None
    )


def _task_utilization(name: str, weights: NDArray[np.float64], rows: ProbeRows) -> TaskUtilization:
    start, stop = next((start, stop) for group, start, stop in rows.groups if group == ORDINARY)
    wins = np.bincount(weights.argmax(axis=1), minlength=weights.shape[1])
    return TaskUtilization(
        task=name,
        mean=tuple(weights[start:stop].mean(axis=0).tolist()),
        low=tuple(weights.min(axis=0).tolist()),
        high=tuple(weights.max(axis=0).tolist()),
        wins=tuple(int(count) for count in wins),
    )

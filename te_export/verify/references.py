"""What every graph is compared with: the oracle's outputs, and torch float32's own, on the same rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from te_export.models.exportable import ExportableModel
from te_export.verify.oracle import evaluate_float32, evaluate_float64
from te_export.verify.probe_rows import ORDINARY, ProbeRows
from te_runtime.manifest import TaskUtilization

__all__ = ["OutputReference", "References", "TaskReference", "evaluate_references", "utilization"]


@dataclass(frozen=True)
class OutputReference:
    """One output over all rows: oracle (N, …) float64 and torch (N, …) float32."""

    oracle: NDArray[np.float64]
    torch: NDArray[np.float32]


@dataclass(frozen=True)
class TaskReference:
    """prediction (N, out) and routing weights (N, K)."""

    prediction: OutputReference
    routing_weights: OutputReference


@dataclass(frozen=True)
class References:
    """Everything a graph may put out, by the oracle and by torch float32.

    Attributes:
        expert_features: (N, K, D), the trunk's output.
        tasks: by task name, in the order of the export.
    """

    rows: ProbeRows
    expert_features: OutputReference
    tasks: dict[str, TaskReference]


def evaluate_references(model: ExportableModel, rows: ProbeRows) -> References:
    """Run the oracle and torch float32 over the rows."""
    x = torch.from_numpy(rows.x)
    oracle = [output.numpy() for output in evaluate_float64(model.module, x)]
    single = [output.numpy() for output in evaluate_float32(model.module, x)]
    outputs = [OutputReference(wide, narrow) for wide, narrow in zip(oracle, single, strict=True)]
    return References(
        rows=rows,
        expert_features=outputs[0],
        tasks={
            name: TaskReference(prediction=outputs[1 + 2 * index], routing_weights=outputs[2 + 2 * index])
            for index, name in enumerate(model.task_names)
        },
    )


def utilization(references: References) -> tuple[TaskUtilization, ...]:
    """How far the rows exercised each task's routing, by the oracle."""
    return tuple(_task_utilization(name, task, references.rows) for name, task in references.tasks.items())


def _task_utilization(name: str, task: TaskReference, rows: ProbeRows) -> TaskUtilization:
    weights = task.routing_weights.oracle
    start, stop = next((start, stop) for group, start, stop in rows.groups if group == ORDINARY)
    wins = np.bincount(weights.argmax(axis=1), minlength=weights.shape[1])
    return TaskUtilization(
        task=name,
        mean=tuple(weights[start:stop].mean(axis=0).tolist()),
        low=tuple(weights.min(axis=0).tolist()),
        high=tuple(weights.max(axis=0).tolist()),
        wins=tuple(int(count) for count in wins),
    )

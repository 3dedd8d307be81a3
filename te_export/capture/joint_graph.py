"""The captured joint graph: the dataclass between capture, rewrite and partition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

__all__ = ["EXPERT_FEATURES", "JointGraph", "prediction_name", "routing_weights_name"]

EXPERT_FEATURES = "expert_features"


def prediction_name(task: str) -> str:
    """Name of a task's prediction in the joint graph."""
    return f"{task}.prediction"


def routing_weights_name(task: str) -> str:
    """Name of a task's routing weights in the joint graph."""
    return f"{task}.routing_weights"


@dataclass(frozen=True)
class JointGraph:
    """One ONNX graph of every task, from ONE capture.

    Attributes:
        model: inputs (batch, …); outputs `expert_features` where the family has such a value, then of each task
            `<task>.prediction`, and `<task>.routing_weights` where it has a gate. Initializers carry the
            checkpoint's parameter names and share the torch parameters' memory.
        tasks: task names, in the order of the outputs.
        opset: the ONNX opset of the graph.
        sources: for every initializer that a rewrite made, the names of the checkpoint's parameters whose
            place it took. An initializer that is not listed is the parameter of its name.
    """

    model: ir.Model
    tasks: tuple[str, ...]
    opset: int
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def outputs_of(self, task: str) -> list[str]:
        """The names of a task's outputs: its prediction, and its routing weights where the graph gives them."""
        given = {value.name for value in self.model.graph.outputs}
        weights = routing_weights_name(task)
        return [prediction_name(task), *([weights] if weights in given else [])]

"""Cutting the joint graph into task graphs, trunk and tails, by reachability.

No second capture; all share the same tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from te_export.capture.joint_graph import EXPERT_FEATURES, JointGraph, prediction_name, routing_weights_name
from te_export.errors import StructureError

__all__ = ["PREDICTION", "ROUTING_WEIGHTS", "GraphSet", "partition"]

PREDICTION = "prediction"
ROUTING_WEIGHTS = "routing_weights"


@dataclass(frozen=True)
class GraphSet:
    """Every graph of one variant.

    Attributes:
        joint: inputs → `<task>.prediction` (batch, out) and `<task>.routing_weights` (batch, K) of every
            task.
        trunk: inputs → `expert_features` (batch, K, D).
        tasks: by task name: inputs → `prediction`, `routing_weights`.
        tails: by task name: `expert_features` → `prediction`, `routing_weights`.
    """

    joint: ir.Model
    trunk: ir.Model
    tasks: dict[str, ir.Model]
    tails: dict[str, ir.Model]


def partition(captured: JointGraph) -> GraphSet:
    """Cut the captured joint graph.

    Raises:
        StructureError: a tail reads something of the trunk other than the expert features.
    """
    source = captured.model
    inputs = [value.name for value in source.graph.inputs if value.name is not None]
    tasks: dict[str, ir.Model] = {}
    tails: dict[str, ir.Model] = {}
    for task in captured.tasks:
        outputs = [prediction_name(task), routing_weights_name(task)]
        tasks[task] = _cut(source, inputs, outputs, name=f"task-{task}")
        tails[task] = _cut(source, [EXPERT_FEATURES], outputs, name=f"tail-{task}")
        for cut in (tasks[task], tails[task]):
            for value, name in zip(cut.graph.outputs, (PREDICTION, ROUTING_WEIGHTS), strict=True):
                value.name = name
    joint_outputs = [
        name for task in captured.tasks for name in (prediction_name(task), routing_weights_name(task))
    ]
    return GraphSet(
        joint=_cut(source, inputs, joint_outputs, name="joint"),
        trunk=_cut(source, inputs, [EXPERT_FEATURES], name="trunk"),
        tasks=tasks,
        tails=tails,
    )


def _cut(source: ir.Model, inputs: list[str], outputs: list[str], *, name: str) -> ir.Model:
    try:
        graph = ir.convenience.extract(source.graph, inputs, outputs)
    except ValueError as error:
        raise StructureError(f"{name} cannot be cut out of the joint graph: {error}") from error
    graph.name = name
    _order_initializers(graph)
    return ir.Model(
        graph,
        ir_version=source.ir_version,
        producer_name=source.producer_name,
        producer_version=source.producer_version,
    )


def _order_initializers(graph: ir.Graph) -> None:
    """Put initializers in the order the nodes read them: extraction leaves them in the order of a set, which
    changes from run to run.
    """
    read = [
        value
        for node in graph
        for value in node.inputs
        if value is not None and value.name in graph.initializers
    ]
    ordered = {value.name: value for value in read if value.name is not None}
    graph.initializers.clear()
    graph.initializers.update(ordered)

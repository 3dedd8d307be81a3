"""Cutting the joint graph into task graphs, trunk and tails, by reachability.

No second capture; all share the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from te_export.capture.joint_graph import EXPERT_FEATURES, JointGraph, prediction_name, routing_weights_name
from te_export.errors import StructureError

__all__ = ["PREDICTION", "ROUTING_WEIGHTS", "GraphSet", "cut_task", "order_initializers", "partition"]

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
        sources: as in JointGraph.
    """

    joint: ir.Model
    trunk: ir.Model
    tasks: dict[str, ir.Model]
    tails: dict[str, ir.Model]
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def models(self) -> tuple[ir.Model, ...]:
        """Every graph, the joint graph first."""
        return (self.joint, self.trunk, *self.tasks.values(), *self.tails.values())


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
        tasks[task] = cut_task(captured, task)
        tails[task] = _cut_tail(captured, task)
    joint_outputs = [
        name for task in captured.tasks for name in (prediction_name(task), routing_weights_name(task))
    ]
    return GraphSet(
        joint=_cut(source, inputs, joint_outputs, name="joint"),
        trunk=_cut(source, inputs, [EXPERT_FEATURES], name="trunk"),
        tasks=tasks,
        tails=tails,
        sources=captured.sources,
    )


def cut_task(captured: JointGraph, task: str) -> ir.Model:
    """The graph of one task, from the inputs.

    Raises:
        StructureError: it cannot be cut out.
    """
    inputs = [value.name for value in captured.model.graph.inputs if value.name is not None]
    outputs = [prediction_name(task), routing_weights_name(task)]
    return _named(_cut(captured.model, inputs, outputs, name=f"task-{task}"))


def _cut_tail(captured: JointGraph, task: str) -> ir.Model:
    outputs = [prediction_name(task), routing_weights_name(task)]
    return _named(_cut(captured.model, [EXPERT_FEATURES], outputs, name=f"tail-{task}"))


def _named(cut: ir.Model) -> ir.Model:
    for value, name in zip(cut.graph.outputs, (PREDICTION, ROUTING_WEIGHTS), strict=True):
        value.name = name
    return cut


def _cut(source: ir.Model, inputs: list[str], outputs: list[str], *, name: str) -> ir.Model:
    try:
        graph = ir.convenience.extract(source.graph, inputs, outputs)
    except ValueError as error:
        raise StructureError(f"{name} cannot be cut out of the joint graph: {error}") from error
    graph.name = name
    order_initializers(graph)
    return ir.Model(
        graph,
        ir_version=source.ir_version,
        producer_name=source.producer_name,
        producer_version=source.producer_version,
    )


def order_initializers(graph: ir.Graph) -> None:
    """Put initializers in the order the nodes read them: extraction leaves them in the order of a set, which
    changes from run to run, and a rewrite in the order it made them.
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

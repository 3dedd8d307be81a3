"""Cutting the joint graph into task graphs, trunk and tails, by reachability.

No second capture; all share the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from te_export.capture.joint_graph import EXPERT_FEATURES, JointGraph
from te_export.errors import StructureError
from te_export.shared_values import shared_values

__all__ = ["PREDICTION", "ROUTING_WEIGHTS", "GraphSet", "cut_task", "order_initializers", "partition"]

PREDICTION = "prediction"
ROUTING_WEIGHTS = "routing_weights"


@dataclass(frozen=True)
class GraphSet:
    """Every graph of one variant.

    Attributes:
        joint: inputs → `<task>.prediction` (batch, out) and `<task>.routing_weights` (batch, K) of every
            task.
        trunk: inputs → what the tails read: `expert_features` (batch, K, D) where the family has them. None where
            the tasks share no layer.
        tasks: by task name: inputs → `prediction`, and `routing_weights` of a task that has a gate.
        tails: by task name: what the trunk gives, and inputs that the tail reads itself → the same; empty
            without a trunk.
        joint_tails: what all tails read → what the joint graph gives. None without a trunk, and where there is
            one tail.
        sources: as in JointGraph.
    """

    joint: ir.Model
    trunk: ir.Model | None
    tasks: dict[str, ir.Model]
    tails: dict[str, ir.Model]
    joint_tails: ir.Model | None = None
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def models(self) -> tuple[ir.Model, ...]:
        """Every graph, the joint graph first."""
        shared = [model for model in (self.trunk, self.joint_tails) if model is not None]
        return (self.joint, *shared, *self.tasks.values(), *self.tails.values())

    def changed(self, change: Callable[[ir.Model], ir.Model]) -> GraphSet:
        """The same graphs, each as `change` gives it."""
        return replace(
            self,
            joint=change(self.joint),
            trunk=None if self.trunk is None else change(self.trunk),
            tasks={name: change(model) for name, model in self.tasks.items()},
            tails={name: change(model) for name, model in self.tails.items()},
            joint_tails=None if self.joint_tails is None else change(self.joint_tails),
        )

    @property
    def joined(self) -> tuple[ir.Model, ...]:
        """The graphs that hold the tails of all tasks together: the joint graph, and the joint tails if there are."""
        return (self.joint,) if self.joint_tails is None else (self.joint, self.joint_tails)


def partition(captured: JointGraph) -> GraphSet:
    """Cut the captured joint graph.

    Raises:
        StructureError: a tail reads something of the trunk other than the expert features.
    """
    source = captured.model
    outputs = [name for task in captured.tasks for name in captured.outputs_of(task)]
    tasks = {task: cut_task(captured, task) for task in captured.tasks}
    boundary = _boundary(captured)
    tails = {task: _cut_tail(captured, task, boundary) for task in captured.tasks if boundary}
    together = len(tails) > 1
    return GraphSet(
        joint=_cut(source, _inputs(source), outputs, name="joint"),
        trunk=_cut(source, _inputs(source), boundary, name="trunk") if boundary else None,
        tasks=tasks,
        tails=tails,
        joint_tails=_cut_joint_tails(captured, outputs, boundary) if together else None,
        sources=captured.sources,
    )


def cut_task(captured: JointGraph, task: str) -> ir.Model:
    """The graph of one task, from the inputs that it needs.

    Raises:
        StructureError: it cannot be cut out.
    """
    cut = _cut(captured.model, _inputs(captured.model), captured.outputs_of(task), name=f"task-{task}")
    return _named(cut, task)


def _boundary(captured: JointGraph) -> list[str]:
    """The values that trunk graphs give and tails read; none where there is no trunk."""
    outputs = [str(value.name) for value in captured.model.graph.outputs]
    return [EXPERT_FEATURES] if EXPERT_FEATURES in outputs else shared_values(captured)


def _cut_tail(captured: JointGraph, task: str, boundary: list[str]) -> ir.Model:
    own = captured.outputs_of(task)
    return _named(_cut(captured.model, _read_by_tails(captured, boundary), own, name=f"tail-{task}"), task)


def _cut_joint_tails(captured: JointGraph, outputs: list[str], boundary: list[str]) -> ir.Model:
    return _cut(captured.model, _read_by_tails(captured, boundary), outputs, name="joint-tails")


def _read_by_tails(captured: JointGraph, boundary: list[str]) -> list[str]:
    return boundary if boundary == [EXPERT_FEATURES] else [*boundary, *_inputs(captured.model)]


def _inputs(model: ir.Model) -> list[str]:
    return [value.name for value in model.graph.inputs if value.name is not None]


def _named(cut: ir.Model, task: str) -> ir.Model:
    for value in cut.graph.outputs:
        value.name = str(value.name).removeprefix(f"{task}.")
    return cut


def _cut(source: ir.Model, inputs: list[str], outputs: list[str], *, name: str) -> ir.Model:
    try:
        graph = ir.convenience.extract(source.graph, inputs, outputs)
    except ValueError as error:
        raise StructureError(f"{name} cannot be cut out of the joint graph: {error}") from error
    graph.name = name
    for value in [value for value in graph.inputs if not value.uses() and not value.is_graph_output()]:
        graph.inputs.remove(value)
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

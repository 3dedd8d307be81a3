"""The switch graph: the trunk, and each task's tail behind a condition of its own.

    x → trunk → expert_features ─┬─ If(asked[0]) → tail of the first task  → prediction, routing weights
    asked (T,) ──────────────────┼─ If(asked[1]) → tail of the second task → prediction, routing weights
                                 └─ …

One session on it answers any choice of tasks in one run: the trunk once, the tails asked for, and no other. The
joint graph computes every task, and a session for each tail takes a run for each task.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from te_export.capture.joint_graph import EXPERT_FEATURES, prediction_name, routing_weights_name
from te_export.errors import StructureError
from te_runtime.interfaces import ASKED

__all__ = ["MOST_TASKS", "make_switch"]

MOST_TASKS = 12
"""A condition takes about 3 µs, met or not. On the reference model one task at one row takes 1.02 of its task graph
with 8 tasks, 1.08 with 12 and 1.33 with 20; trunk and tail in two sessions take 1.00, 1.00 and 1.08."""

_NAME = "switch"


def make_switch(trunk: ir.Model, tails: Mapping[str, ir.Model]) -> ir.Model | None:
    """Make the switch graph of a trunk and its tails, which stay as they are; all share their tensors.

    Works on operators of any kind, so for every precision.

    Args:
        trunk: inputs → `expert_features`.
        tails: by task name: `expert_features` → prediction, routing weights.

    Returns:
        inputs of the trunk and `asked` (T,) bool → `<task>.prediction`, `<task>.routing_weights` of each task;
        without rows where the task's place in `asked` is false. None where there are too few or too many tasks
        for it to be of use.

    Raises:
        StructureError: a graph does not have the form above.
    """
    if not 1 < len(tails) <= MOST_TASKS:
        return None
    model = trunk.clone()
    graph = model.graph
    graph.name = _NAME
    (features,) = graph.outputs
    graph.outputs.clear()
    _check_flat(graph)
    asked = ir.val(ASKED, ir.DataType.BOOL, (len(tails),))
    if ASKED in _names(graph):
        raise StructureError(f"{_NAME}: the trunk has a value {ASKED!r} already")
    graph.inputs.append(asked)
    conditions = _split(asked, len(tails))
    graph.append(conditions)
    for (task, tail), condition in zip(tails.items(), conditions.outputs, strict=True):
        node = _behind_condition(graph, task, tail.clone().graph, features=features, condition=condition)
        graph.append(node)
        graph.outputs.extend(node.outputs)
    return model


def _check_flat(graph: ir.Graph) -> None:
    if any(True for _ in graph.subgraphs()):
        raise StructureError(f"{_NAME}: {graph.name} has nodes with graphs inside, expected none")


def _names(graph: ir.Graph) -> set[str | None]:
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    return {value.name for value in values}


def _split(asked: ir.Value, tasks: int) -> ir.Node:
    """`asked` (T,) in T pieces (1,)."""
    attributes = ir.convenience.convert_attributes({"axis": 0, "num_outputs": tasks})
    node = ir.Node("", "Split", [asked], attributes=attributes, num_outputs=tasks, name=f"{ASKED}.split")
    for place, value in enumerate(node.outputs):
        value.name = f"{ASKED}.{place}"
        value.shape, value.type = ir.Shape((1,)), ir.TensorType(ir.DataType.BOOL)
    return node


def _behind_condition(
    graph: ir.Graph, task: str, tail: ir.Graph, *, features: ir.Value, condition: ir.Value
) -> ir.Node:
    """The If that computes `tail`, which is used up, or gives outputs without rows."""
    _check_flat(tail)
    if [value.name for value in tail.inputs] != [EXPERT_FEATURES] or len(tail.outputs) != 2:
        raise StructureError(f"{_NAME}: {tail.name} is no tail: expected {EXPERT_FEATURES} → two outputs")
    _import_opsets(graph, tail)
    tail.inputs[0].replace_all_uses_with(features)
    for value in list(tail.initializers.values()):
        value.replace_all_uses_with(_at_top(graph, value, task))
    nodes, outputs = list(tail), list(tail.outputs)
    tail.outputs.clear()
    tail.remove(nodes)
    for node in nodes:
        for value in node.outputs:
            value.name = f"{task}/{value.name}" if value.name else value.name
    empty = [_without_rows(value) for value in outputs]
    branches = {
        "then_branch": ir.Graph([], outputs, nodes=nodes, name=f"{task}/asked"),
        "else_branch": ir.Graph([], [n.outputs[0] for n in empty], nodes=empty, name=f"{task}/not_asked"),
    }
    attributes = [ir.AttrGraph(name, branch) for name, branch in branches.items()]
    made = ir.Node("", "If", [condition], attributes=attributes, num_outputs=2, name=task)
    names = prediction_name(task), routing_weights_name(task)
    for output, value, name in zip(made.outputs, outputs, names, strict=True):
        output.name, output.shape, output.type = name, value.shape, value.type
    return made


def _import_opsets(graph: ir.Graph, tail: ir.Graph) -> None:
    """Let the graph know every domain of operators that the tail does: those of quantized layers, for one."""
    for domain, version in tail.opset_imports.items():
        known = graph.opset_imports.setdefault(domain, version)
        if known != version:
            raise StructureError(
                f"{_NAME}: {tail.name} is of opset {version} of {domain or 'ai.onnx'}, others of {known}"
            )


def _at_top(graph: ir.Graph, value: ir.Value, task: str) -> ir.Value:
    """The tail's initializer at the top level, where ONNX Runtime lets go of a weight once it has packed it.

    Of a weight inside a branch it would keep both.
    """
    tensor = value.const_value
    assert tensor is not None  # initializers have values
    known = graph.initializers.get(str(value.name))
    if known is not None and _is_same(known.const_value, tensor):
        return known
    name = str(value.name) if known is None else f"{task}/{value.name}"
    made = ir.Value(name=name, shape=value.shape, type=value.type, const_value=tensor)
    graph.register_initializer(made)
    return made


def _is_same(known: ir.TensorProtocol | None, tensor: ir.TensorProtocol) -> bool:
    """Whether two tensors of one name are one tensor; tails name shapes alike that are not."""
    return known is tensor or (
        known is not None and known.dtype == tensor.dtype and np.array_equal(known.numpy(), tensor.numpy())
    )


def _without_rows(like: ir.Value) -> ir.Node:
    """A constant (0, …) of the dtype and the further axes of `like`."""
    axes = [axis for axis in list(like.shape or ())[1:] if isinstance(axis, int)]
    if like.dtype is None or like.shape is None or len(axes) != len(like.shape) - 1:
        raise StructureError(
            f"{_NAME}: {like.name} has shape {like.shape}, expected numbers after the batch axis"
        )
    name = f"{like.name}.none"
    tensor = ir.tensor(np.zeros((0, *axes), like.dtype.numpy()), name=name)
    node = ir.Node("", "Constant", [], attributes=[ir.AttrTensor("value", tensor)], name=name)
    node.outputs[0].name = name
    node.outputs[0].shape = ir.Shape((0, *axes))
    node.outputs[0].type = ir.TensorType(like.dtype)
    return node

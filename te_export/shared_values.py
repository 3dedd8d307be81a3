"""Where the trunk ends in a joint graph whose family has no name for it: found by reachability.

The trunk is every node that all tasks need; what it gives are the values that some node outside it reads. Such a
value has to cross from one session to another, so it must be float32 with the batch axis first and the other
axes known: whatever gives anything else (a count taken from a shape, weights alone, features with the experts
first) is left to the tails, which compute it again; and so is another layout of a value that may cross itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from te_export.capture.joint_graph import JointGraph
from te_export.capture.tidy import BATCH

__all__ = ["shared_values"]

_VIEWS = frozenset({"Reshape", "Flatten", "Unsqueeze", "Squeeze", "Identity"})


def shared_values(captured: JointGraph) -> list[str]:
    """Names of the values between trunk and tails, in the order of the graph; none where no layer is shared."""
    graph = captured.model.graph
    if len(captured.tasks) < 2:
        return []
    trunk = _needed_by_all(captured)
    while True:
        misfit = {value.producer() for value in _crossing(graph, trunk) if not _should_cross(value)}
        if not misfit:
            break
        trunk -= misfit
    if not any(_has_weights(node) for node in trunk):
        return []
    return [str(value.name) for value in _crossing(graph, trunk)]


def _needed_by_all(captured: JointGraph) -> set[ir.Node | None]:
    graph = captured.model.graph
    everyone = (1 << len(captured.tasks)) - 1
    masks: dict[ir.Value, int] = {}
    for index, task in enumerate(captured.tasks):
        names = set(captured.outputs_of(task))
        for value in graph.outputs:
            if value.name in names:
                masks[value] = masks.get(value, 0) | 1 << index
    trunk: set[ir.Node | None] = set()
    for node in reversed(list(graph)):  # readers stand after what they read
        mask = 0
        for output in node.outputs:
            mask |= masks.get(output, 0)
        for read in node.inputs:
            if read is not None:
                masks[read] = masks.get(read, 0) | mask
        if mask == everyone:
            trunk.add(node)
    return trunk


def _crossing(graph: ir.Graph, trunk: set[ir.Node | None]) -> Iterator[ir.Value]:
    """Values of trunk nodes that other nodes read, or that are outputs of the graph."""
    for node in graph:
        if node in trunk:
            for value in node.outputs:
                if value.is_graph_output() or any(use.node not in trunk for use in value.uses()):
                    yield value


def _should_cross(value: ir.Value) -> bool:
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type in _VIEWS else None
    return _may_cross(value) and (source is None or source.is_graph_input() or not _may_cross(source))


def _may_cross(value: ir.Value) -> bool:
    shape = value.shape
    if value.is_graph_output():  # it keeps the output's name, so each tail makes it for itself
        return False
    if value.dtype != ir.DataType.FLOAT or shape is None or len(shape) < 2 or isinstance(shape[0], int):
        return False
    return str(shape[0].value) == BATCH and all(isinstance(axis, int) for axis in list(shape)[1:])


def _has_weights(node: ir.Node | None) -> bool:
    return node is not None and any(
        value is not None and value.const_value is not None and not value.const_value.dtype.is_integer()
        for value in node.inputs
    )

"""The switch graph computes what trunk and tails compute: proved node by node, for operators of any kind.

Every output of a task is followed up through the branch of its condition and through the tail at once, and from
where the tail reads the expert features through the switch's top level and the trunk. At each step there is the same
operator with the same attributes and inputs in both, or the same input, or the same tensor. What check_structure
proves of trunk and tails therefore holds of the switch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from te_export.capture.joint_graph import prediction_name, routing_weights_name
from te_export.errors import StructureError
from te_runtime.interfaces import ASKED

__all__ = ["check_switch"]


def check_switch(switch: ir.Graph, trunk: ir.Graph, tails: Mapping[str, ir.Graph]) -> None:
    """Prove that each task asked for is computed by its own tail on the trunk, and no other task is computed.

    Raises:
        StructureError: naming the value that is not made as it is in trunk or tail.
    """
    _check_names(switch)
    _check_interface(switch, trunk, tails)
    (features,) = trunk.outputs
    chosen = list(switch.outputs)
    for place, (task, tail) in enumerate(tails.items()):
        node = chosen[2 * place].producer()
        if node is None or node.op_type != "If" or list(node.outputs) != chosen[2 * place : 2 * place + 2]:
            raise StructureError(f"{switch.name}: {task} is not behind one condition of its own")
        _check_condition(switch, task, node, place)
        branch = node.attributes["then_branch"].as_graph()
        for found, expected in zip(branch.outputs, tail.outputs, strict=True):
            _check_same(found, expected, features=(tail.inputs[0], features), where=f"{switch.name}: {task}")
        _check_nothing_runs(switch, task, node.attributes["else_branch"].as_graph())


def _check_names(switch: ir.Graph) -> None:
    """In the file, values are linked by name alone, through the branches too."""
    graphs = (switch, *switch.subgraphs())
    names = Counter(value.name for graph in graphs for value in _values(graph) if value.name)
    twice = sorted(str(name) for name, count in names.items() if count > 1)
    if twice:
        raise StructureError(
            f"{switch.name}: {len(twice)} names stand for two values: {', '.join(twice[:8])}"
        )


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _check_interface(switch: ir.Graph, trunk: ir.Graph, tails: Mapping[str, ir.Graph]) -> None:
    outputs = [name for task in tails for name in (prediction_name(task), routing_weights_name(task))]
    for what, found, expected in (
        ("inputs", switch.inputs, [*(value.name for value in trunk.inputs), ASKED]),
        ("outputs", switch.outputs, outputs),
    ):
        names = [value.name for value in found]
        if names != expected:
            raise StructureError(f"{switch.name}: its {what} are {names}, expected {expected}")


def _check_condition(switch: ir.Graph, task: str, node: ir.Node, place: int) -> None:
    """The condition is the task's own element of `asked`."""
    (condition,) = node.inputs
    split = condition.producer() if condition is not None else None
    asked = switch.inputs[-1]
    if (
        split is None
        or split.op_type != "Split"
        or list(split.inputs) != [asked]
        or list(asked.shape or ()) != [len(split.outputs)]
        or condition is not split.outputs[place]
    ):
        raise StructureError(f"{switch.name}: {task} does not depend on element {place} of {ASKED}")


def _check_same(
    found: ir.Value, expected: ir.Value, *, features: tuple[ir.Value, ir.Value], where: str
) -> None:
    """Both values are the same function of the model's inputs.

    Args:
        features: what tails read, and the trunk's output, which takes its place.
    """
    seen: set[tuple[ir.Value, ir.Value]] = set()
    waiting = [(found, expected)]
    while waiting:
        one, other = waiting.pop()
        if other is features[0]:
            other = features[1]
        if (one, other) in seen:
            continue
        seen.add((one, other))
        if not _is_same_step(one, other):
            raise StructureError(
                f"{where}: {one.name} is not made as {other.name} is in trunk and tail. "
                "The graph would give other numbers; nothing was written."
            )
        node, twin = one.producer(), other.producer()
        if node is not None and twin is not None:
            pairs = zip(node.inputs, twin.inputs, strict=True)
            waiting += [(a, b) for a, b in pairs if a is not None and b is not None]


def _is_same_step(found: ir.Value, expected: ir.Value) -> bool:
    """The same operator made both, or both are one tensor, or one input."""
    node, twin = found.producer(), expected.producer()
    if node is not None and twin is not None:
        return (
            found.index() == expected.index()
            and (node.domain, node.op_type, node.overload) == (twin.domain, twin.op_type, twin.overload)
            and dict(node.attributes) == dict(twin.attributes)
            and [value is None for value in node.inputs] == [value is None for value in twin.inputs]
            and len(node.outputs) == len(twin.outputs)
        )
    if found.const_value is not None and expected.const_value is not None:
        return node is twin and _is_same_tensor(found.const_value, expected.const_value)
    return node is twin and found.name == expected.name and found.const_value is expected.const_value


def _is_same_tensor(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    return one is other or (one.dtype == other.dtype and np.array_equal(one.numpy(), other.numpy()))


def _check_nothing_runs(switch: ir.Graph, task: str, branch: ir.Graph) -> None:
    """The branch of a task that was not asked for is constants without rows."""
    for value in branch.outputs:
        node = value.producer()
        constant = node is not None and node.op_type == "Constant"
        tensor = node.attributes["value"].as_tensor() if node is not None and constant else None
        if tensor is None or tensor.shape[0] != 0:
            raise StructureError(f"{switch.name}: {value.name} of {task} is not a constant without rows")
    if len(branch) != len(branch.outputs):
        raise StructureError(f"{switch.name}: {task} has {len(branch)} nodes where it was not asked for")

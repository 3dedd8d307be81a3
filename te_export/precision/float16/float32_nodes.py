"""Which nodes of a graph go on computing in float32 when the rest computes in float16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir

from te_export.partition import ROUTING_WEIGHTS
from te_export.precision.float16.half_weights import is_beyond_float16, parts_of
from te_export.rewrite.linear import ACTIVATIONS, only_reader

__all__ = ["float32_nodes", "is_weight"]

_FLOAT32_OPERATORS: Mapping[str, str] = {
    **dict.fromkeys(
        ("Softmax", "LogSoftmax", "ReduceLogSumExp"),
        "shares of a sum are shown to people and must add up to 1",
    ),
    **dict.fromkeys(
        ("Exp", "Softplus", "Mish", "ReduceLogSum"), "an exponential of 11.1 or more is infinite in float16"
    ),
    **dict.fromkeys(
        ("ReduceSum", "ReduceMean", "ReduceL1", "CumSum", "GlobalAveragePool"),
        "each term of a long sum in float16 would be rounded to the size of the sum",
    ),
    **dict.fromkeys(
        ("Pow", "ReduceSumSquare", "ReduceL2", "ReduceProd"),
        "the square of 256 is infinite in float16",
    ),
    **dict.fromkeys(
        ("BatchNormalization", "InstanceNormalization", "GroupNormalization", "LpNormalization"),
        "it divides by a variance that may be too small; LayerNormalization takes its own in float32 anyway",
    ),
    **dict.fromkeys(("Cast", "CastLike"), "its output's type is its purpose"),
}
"""Operators that could take float16, and why they are not given it."""

_FLOAT16 = "tensor(float16)"

_CARRIERS = ACTIVATIONS | {
    *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"),
    *("Transpose", "Split", "Concat", "Slice", "Gather", "Expand"),
}
"""Operators that move values or treat each by itself: they work in whatever type lies on both sides."""

_MASKING = _CARRIERS | {"Add", "Sub", "Mul", "Where", "Max", "Min", "ScatterElements"}
"""Operators between a mask of huge or infinite values and the softmax that makes zeros of them."""


_CHOICES = frozenset({"TopK", "ArgMax"})
_SCORED = _CHOICES | {"Softmax", "Sigmoid"}
"""Operators that the weights of a gate begin with."""

_LAYERS = frozenset({"Gemm", "MatMul", "Conv", "LayerNormalization", "Einsum", "GRU", "LSTM", "RNN"})


def float32_nodes(graph: ir.Graph, kept: frozenset[str]) -> frozenset[ir.Node]:
    """The nodes that stay as they are.

    They are those whose operator cannot take float16 or should not, those of kept layers, those that add a mask
    beyond float16 to what a softmax reads, those that choose experts, and carriers that lead from a float32 value to a
    place that needs one: between Softmax and the routing weights output, the weights are reshaped and split in float32.

    Args:
        graph: float32 values, its nodes sorted.
        kept: names of weights; the nodes that read one stay.
    """
    fixed = {node for node in graph if node.op_type in _FLOAT32_OPERATORS or not _takes_float16(node, graph)}
    fixed |= set(_kept_layers(graph, kept))
    fixed |= set(_masking_nodes(graph)) | _choosing_nodes(graph)
    needed = _needed_values(graph, fixed)
    float32 = set(fixed)
    for node in graph:
        read = [value for value in node.inputs if value and _is_float32(value) and not is_weight(value)]
        comes = bool(read) and all(_comes_as_float32(value, float32) for value in read)
        if node.op_type in _CARRIERS and comes and not needed.isdisjoint(node.outputs):
            float32.add(node)
    return frozenset(float32)


def is_weight(value: ir.Value | None) -> bool:
    """Whether `value` is a float32 initializer."""
    return value is not None and value.is_initializer() and _is_float32(value)


def _needed_values(graph: ir.Graph, fixed: set[ir.Node]) -> set[ir.Value]:
    """The values that an output or a node of `fixed` reads, itself or through carriers."""
    needed: set[ir.Value] = set(graph.outputs)
    for node in reversed(graph):
        if node in fixed or (node.op_type in _CARRIERS and not needed.isdisjoint(node.outputs)):
            needed |= {value for value in node.inputs if value is not None}
    return needed


def _comes_as_float32(value: ir.Value, float32: set[ir.Node]) -> bool:
    producer = value.producer()
    return producer is None or producer in float32


def _kept_layers(graph: ir.Graph, kept: frozenset[str]) -> Iterator[ir.Node]:
    """The nodes that read a kept weight; a MatMul together with the addition of its bias."""
    for node in graph:
        names = {part.name for value in node.inputs if value and is_weight(value) for part in parts_of(value)}
        if kept.isdisjoint(names):
            continue
        yield node
        reader = only_reader(node.outputs[0])
        if node.op_type == "MatMul" and reader is not None and reader.op_type == "Add":
            yield from [reader] if any(is_weight(value) for value in reader.inputs) else []


def _masking_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes on the way to a softmax that read a constant beyond float16, or what such a node gives: in float16 a row of
    nothing but -1e9 would be one of nothing but -inf, and its softmax no number.
    """
    masked: set[ir.Value] = set()
    for node in reversed(graph):
        on_the_way = node.op_type in _MASKING and not masked.isdisjoint(node.outputs)
        if on_the_way or node.op_type in ("Softmax", "LogSoftmax"):
            masked |= {value for value in node.inputs if value is not None}
    beyond: set[ir.Value] = set()
    for node in graph:
        read = [value for value in node.inputs if value is not None]
        if node.op_type not in _MASKING or masked.isdisjoint(node.outputs):
            continue
        if any(value in beyond or is_beyond_float16(value) for value in read):
            beyond |= {value for value in node.outputs if _is_float32(value)}
            yield node


def _choosing_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Nodes between scores and routing weights, such as the largest two and their share of the sum: in float16 weights are
    equal that are not, and which of them is chosen would be chance. A trunk may make them for tails that give them.
    """
    after: set[ir.Node] = set()
    for node in graph:
        makers = {value.producer() for value in node.inputs if value is not None}
        if node.op_type in _SCORED or not (_is_layer(node) or after.isdisjoint(makers)):
            after.add(node)
    found: set[ir.Node] = set()
    for output in graph.outputs:
        above = {node for node in _above(output) if node in after}
        if str(output.name).endswith(ROUTING_WEIGHTS) or any(node.op_type in _CHOICES for node in above):
            found |= above
    return found


def _above(value: ir.Value) -> set[ir.Node]:
    """The nodes that a value is made by, up to layers."""
    above: set[ir.Node] = set()
    waiting = [value]
    while waiting:
        maker = waiting.pop().producer()
        if maker is not None and maker not in above and not _is_layer(maker):
            above.add(maker)
            waiting += [read for read in maker.inputs if read is not None]
    return above


def _is_layer(node: ir.Node) -> bool:
    """Whether it multiplies by weights, and not two computed values with one another."""
    return node.op_type in _LAYERS and any(is_weight(value) for value in node.inputs)


def _takes_float16(node: ir.Node, graph: ir.Graph) -> bool:
    """Whether every float32 value it reads and gives may be float16 instead; a node that reads none, such as
    Constant, says its type by itself.
    """
    if node.domain not in ("", "ai.onnx") or not any(value and _is_float32(value) for value in node.inputs):
        return False
    schema = onnx.defs.get_schema(node.op_type, graph.opset_imports[""], "")
    takes = {entry.type_param_str: _FLOAT16 in entry.allowed_type_strs for entry in schema.type_constraints}
    return all(
        takes.get(formal[min(index, len(formal) - 1)].type_str, False)
        for formal, values in ((schema.inputs, node.inputs), (schema.outputs, node.outputs))
        for index, value in enumerate(values)
        if value is not None and _is_float32(value)
    )


def _is_float32(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT

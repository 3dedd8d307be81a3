"""What nodes that read constants alone give, computed ahead.

Operators that only move elements are applied to the constants as they are. All others are applied to float64 copies,
and what they give stays float64 from node to node, so that a chain rounds once, at its end. The arithmetic is that of
onnx's reference evaluator. Only operators of a closed list are computed: deterministic, without a subgraph, and with
one meaning in every opset that is exported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

__all__ = ["MOVES", "SMALL_BYTES", "Constants", "Values", "compute_constants", "is_constant", "size_bytes"]

SMALL_BYTES = 4096
"""What a chain may add to the weights; nodes that a session runs at every call cost more than reading that."""

MOVES = frozenset(
    {"Gather", "Slice", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand", "Tile", "Concat", "Split"}
    | {"Identity", "Where"}
)  # fmt: skip
"""Operators that give elements of what they read, as they are."""
_COMPUTES = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Neg", "Exp", "Log", "Sqrt", "Reciprocal", "Abs", "Sign", "Sin", "Cos", "Cast"}
    | {"Softmax", "LogSoftmax", "Softplus", "Sigmoid", "Tanh", "Relu", "Clip", "Min", "Max", "MatMul", "Gemm", "Einsum"}
    | {"ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2", "ReduceSumSquare"}
    | {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Not", "And", "Or"}
)  # fmt: skip
_DTYPES = frozenset(
    {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}
)

Values = NDArray[np.generic]


@dataclass(frozen=True)
class Constants:
    """What a graph computes from constants alone.

    Attributes:
        values: what each node gives whose inputs are all constants or given by such nodes, before it is rounded.
        nodes: those nodes, in the order of the graph.
        refused: nodes that read nothing but these and constants and were not computed, with the reason.
    """

    values: dict[ir.Value, Values] = field(default_factory=dict)
    nodes: list[ir.Node] = field(default_factory=list)
    refused: dict[ir.Node, str] = field(default_factory=dict)


def compute_constants(graph: ir.Graph) -> Constants:
    """Compute every node of `graph` that reads constants alone, one after another."""
    found = Constants()
    behind: dict[ir.Value, frozenset[ir.Value]] = {}
    for node in graph:
        read = [value for value in node.inputs if value is not None]
        if not read or not all(value in found.values or is_constant(value) for value in read):
            continue
        leaves = frozenset[ir.Value]().union(*(behind.get(value, {value}) for value in read))
        given = _refusal(node, sum(map(size_bytes, leaves))) or _evaluate(
            node, graph.opset_imports[""], found.values
        )
        if isinstance(given, str):
            found.refused[node] = given
            continue
        found.nodes.append(node)
        found.values.update(zip(node.outputs, given, strict=True))
        behind.update(dict.fromkeys(node.outputs, leaves))
    return found


def is_constant(value: ir.Value) -> bool:
    """Whether `value` is an initializer that no caller can replace, of a type that is computed with."""
    tensor = value.const_value
    return (
        value.is_initializer()
        and not value.is_graph_input()
        and tensor is not None
        and tensor.dtype in _DTYPES
    )


def size_bytes(value: ir.Value) -> int:
    """What `value`, whose shape and type are known, takes in a graph."""
    assert value.shape is not None  # initializers have both, and _refusal looks for them
    assert value.dtype is not None
    return math.ceil(math.prod(value.shape.numpy()) * value.dtype.itemsize)


def _refusal(node: ir.Node, behind_bytes: int) -> str:
    """Why `node` is not to be computed; empty where it is.

    Args:
        behind_bytes: of all constants behind it. A value larger than they are is not even made: a constant can be
            expanded to any size.
    """
    if node.domain not in ("", "ai.onnx") or node.op_type not in MOVES | _COMPUTES:
        return f"it reads constants alone, but a {node.op_type} is no operator that is computed ahead"
    for value in node.outputs:
        if value.is_graph_output():
            return f"its output {value.name} is a constant, and leaves the graph"
        if value.shape is None or not value.shape.is_static() or value.dtype not in _DTYPES:
            return (
                f"it reads constants alone, but shape and type of its output {value.name} are not known ahead"
            )
        if size_bytes(value) > max(behind_bytes, SMALL_BYTES):
            return (
                f"its output {value.name} takes {size_bytes(value):,} bytes, more than the {SMALL_BYTES:,} that are "
                f"allowed and the {behind_bytes:,} of the constants behind it"
            )
    return ""


def _evaluate(node: ir.Node, opset: int, known: dict[ir.Value, Values]) -> list[Values] | str:
    """What `node` gives, or why that is no constant to keep."""
    read = {str(value.name): _values(value, known) for value in node.inputs if value is not None}
    floats = [name for name, values in read.items() if values.dtype.kind == "f"]
    if node.op_type not in MOVES or len(floats) > 1:
        read |= {name: read[name].astype(np.float64) for name in floats}
    names = [str(value.name) for value in node.outputs]
    function = onnx.helper.make_function(
        "te_export", "ahead", list(read), names, [ir.to_proto(node)], [onnx.helper.make_opsetid("", opset)]
    )
    with np.errstate(all="ignore"):  # what is not finite is looked for below
        given = [np.asarray(values) for values in ReferenceEvaluator(function).run(None, read, {})]
    if node.op_type not in MOVES and not all(np.isfinite(values).all() for values in given):
        return "it reads constants alone, but what it gives is not finite"
    return given


def _values(value: ir.Value, known: dict[ir.Value, Values]) -> Values:
    if value in known:
        return known[value]
    assert value.const_value is not None  # is_constant saw it
    values: Values = value.const_value.numpy()
    return values

"""Counting what one row costs in a graph."""

from __future__ import annotations

import math
from collections import Counter

import onnx_ir as ir

from te_export.rewrite.edit import axes_of
from te_export.rewrite.log import GraphCost
from te_export.rewrite.row_axis import elements_per_row

__all__ = ["measure_cost"]


def measure_cost(graph: ir.Graph) -> GraphCost:
    """Nodes by operator, multiply-adds of one row, and bytes of the weights."""
    counts = Counter(node.op_type for node in graph)
    tensors = [value.const_value for value in graph.initializers.values()]
    return GraphCost(
        nodes=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        multiply_adds=sum(_multiply_adds(node) for node in graph),
        weight_bytes=sum(
            tensor.nbytes for tensor in tensors if tensor is not None and tensor.dtype != ir.DataType.INT64
        ),
    )


def _multiply_adds(node: ir.Node) -> int:
    """Elements of the output for one row, times the terms of the sum behind each."""
    written = _elements(node.outputs[0])
    if node.op_type == "Mul":
        return written
    if node.op_type == "Conv":
        return written * math.prod(_sizes(node.inputs[1])[1:])
    if node.op_type == "MatMul":
        return written * (_sizes(node.inputs[0]) or [1])[-1]
    if node.op_type == "Gemm":
        weight = _sizes(node.inputs[1])
        turned = node.attributes.get("transB")
        return written * (weight[1] if turned is not None and turned.as_int() else weight[0])
    return 0


def _elements(value: ir.Value) -> int:
    return math.prod(_sizes(value))


def _sizes(value: ir.Value | None) -> list[int]:
    """The shape for one row of the batch."""
    axes = axes_of(value)
    return [0] if axes is None else [elements_per_row(axis) for axis in axes]

"""Which linear layers of a graph are worth converting, and what their weights are called in every graph."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from te_export.rewrite.large_layers import is_large
from te_export.rewrite.linear import Linear, read_linear, tensor_of
from te_export.rewrite.stack import stack_of

__all__ = ["linear_layers", "weight_names"]


def linear_layers(graph: ir.Graph) -> Iterator[Linear]:
    """The Gemm nodes with large constant float32 weights, in the order of the graph.

    A weight that is stored as (in, out) and stacked is left out.
    """
    for node in graph:
        linear = read_linear(node)
        if isinstance(linear, str) or not is_large(linear):
            continue
        if linear.turned and stack_of(tensor_of(linear.weight)) is not None:
            continue
        yield linear


def weight_names(linear: Linear) -> tuple[str, ...]:
    """The weights behind a layer: its own, or the parts of the stack that it is. Joint and task graphs agree
    on them, whatever was stacked.
    """
    stack = stack_of(tensor_of(linear.weight))
    return (str(linear.weight.name),) if stack is None else tuple(part.name for part in stack.parts)

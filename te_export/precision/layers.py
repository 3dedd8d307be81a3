"""Which linear layers of a graph are worth converting, and what their weights are called in every graph."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from te_export.rewrite.linear import Linear, read_linear, tensor_of
from te_export.rewrite.stack import stack_of

__all__ = ["SMALLEST_WEIGHT", "linear_layers", "weight_names"]

SMALLEST_WEIGHT = 16_384
"""Elements. Converting a smaller layer was measured to cost more time than it saves."""


def linear_layers(graph: ir.Graph) -> Iterator[Linear]:
    """The Gemm nodes with constant float32 weights of at least SMALLEST_WEIGHT elements in each part of a
    stack, in the order of the graph.

    A part counts, not the stack, so that a layer that is stacked in one graph and alone in another is
    converted in both or in neither. A weight that is stored as (in, out) and stacked is left out.
    """
    for node in graph:
        linear = read_linear(node)
        if isinstance(linear, str):
            continue
        stack = stack_of(tensor_of(linear.weight))
        rows = (
            [linear.width_out]
            if stack is None
            else [int(part.tensor.shape.numpy()[0]) for part in stack.parts]
        )
        if linear.width_in * min(rows) < SMALLEST_WEIGHT or (stack and linear.turned):
            continue
        yield linear


def weight_names(linear: Linear) -> tuple[str, ...]:
    """The weights behind a layer: its own, or the parts of the stack that it is. Joint and task graphs agree
    on them, whatever was stacked.
    """
    stack = stack_of(tensor_of(linear.weight))
    return (str(linear.weight.name),) if stack is None else tuple(part.name for part in stack.parts)

"""Which convolutions of a graph are worth converting. Static int8 alone converts them.

All that take long enough are. A first one of three channels, or one of each channel apart, sums few terms and takes 1.2 to
2.2 times as long in int8 by itself; left in float32 between others it costs more, since values are laid out otherwise
there: a network of three convolutions takes 0.45 to 0.53 of float32's time with the first converted, 0.82 to 1.05 without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from te_export.rewrite.edit import axes_of
from te_export.rewrite.linear import is_float_constant, only_reader, tensor_of
from te_export.rewrite.row_axis import elements_per_row

__all__ = ["Convolution", "Limits", "convolutions"]

_MOST_AXES = 4
"""In three dimensions onnxruntime takes 3.2 to 3.7 times as long in int8 as in float32."""
_FEWEST_MULTIPLY_ADDS = 16_384
"""Of one row: as many as the smallest linear layer that is converted."""


@dataclass(frozen=True)
class Limits:
    """A Relu, or a Clip such as ReLU6: values below `low` become `low`, those above `high` become `high`."""

    node: ir.Node
    low: float
    high: float


@dataclass(frozen=True)
class Convolution:
    """A Conv with constant weights.

    Attributes:
        weight: (channels out, channels in / groups, kernel …) float32.
        bias: (channels out,), or None.
        limits: what the node after it keeps its values within, where that node reads it alone; None where there is
            no such node.
    """

    node: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    limits: Limits | None

    @property
    def x(self) -> ir.Value:
        """What it reads now: (B, channels in, places …)."""
        value = self.node.inputs[0]
        assert value is not None  # the operator requires it
        return value

    @property
    def output(self) -> ir.Value:
        """Within its limits."""
        return (self.node if self.limits is None else self.limits.node).outputs[0]

    @property
    def name(self) -> str:
        """The weight's name: the same in every graph."""
        return str(self.weight.name)


def convolutions(graph: ir.Graph) -> Iterator[Convolution]:
    """The convolutions with constant float32 weights that take long enough, in the order of the graph."""
    for node in graph:
        if node.op_type != "Conv" or node.domain not in ("", "ai.onnx"):
            continue
        x, weight, bias = (*node.inputs, None)[:3]
        axes = axes_of(node.outputs[0])
        if x is None or weight is None or axes is None or len(axes) > _MOST_AXES:
            continue
        if not is_float_constant(weight, rank=len(axes)) or (bias and not is_float_constant(bias, rank=1)):
            continue
        per_value = math.prod(int(axis) for axis in tensor_of(weight).shape.numpy()[1:])
        if math.prod(map(elements_per_row, axes)) * per_value < _FEWEST_MULTIPLY_ADDS:
            continue
        yield Convolution(node, weight, bias, _limits(only_reader(node.outputs[0])))


def _limits(node: ir.Node | None) -> Limits | None:
    """What a node keeps values within; None if it does something else, or its limits are computed."""
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Relu":
        return Limits(node, 0.0, math.inf)
    if node.op_type != "Clip":
        return None
    ends = [
        open_end if value is None else None if value.const_value is None else float(value.const_value.numpy())
        for value, open_end in zip((*node.inputs[1:], None, None), (-math.inf, math.inf), strict=False)
    ]
    low, high = ends
    return None if low is None or high is None else Limits(node, low, high)

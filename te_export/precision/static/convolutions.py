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

__all__ = ["Convolution", "convolutions"]

_MOST_AXES = 4
"""In three dimensions onnxruntime takes 3.2 to 3.7 times as long in int8 as in float32."""
_FEWEST_MULTIPLY_ADDS = 16_384
"""Of one row: as many as the smallest linear layer that is converted."""


@dataclass(frozen=True)
class Convolution:
    """A Conv with constant weights.

    Attributes:
        weight: (channels out, channels in / groups, kernel …) float32.
        bias: (channels out,), or None.
        relu: the node after it, where that is a Relu and reads it alone.
    """

    node: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    relu: ir.Node | None

    @property
    def x(self) -> ir.Value:
        """What it reads now: (B, channels in, places …)."""
        value = self.node.inputs[0]
        assert value is not None  # the operator requires it
        return value

    @property
    def output(self) -> ir.Value:
        """After the Relu."""
        return (self.node if self.relu is None else self.relu).outputs[0]

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
        reader = only_reader(node.outputs[0])
        relu = reader if reader is not None and reader.op_type == "Relu" else None
        yield Convolution(node, weight, bias, relu)

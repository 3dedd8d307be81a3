"""Convolutions in 8 bits, with scales measured beforehand, in standard operators.

    y = Relu(Conv(x, W, b))  →  Q, DQ → Conv(DQ(W int8), DQ(b int32)) → Q, DQ

Q and DQ are QuantizeLinear and DequantizeLinear, and onnxruntime runs what stands between as one QLinearConv. A Relu or
a Clip is left out: the range of Q keeps values within its limits. Everything else, such as pooling and the sum of a
residual block, stays float32: in 8 bits it was measured to be no faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from te_export.precision.static.activation_ranges import LayerRange, Range
from te_export.precision.static.conv_weights import ConvWeights
from te_export.precision.static.convolutions import Convolution
from te_export.precision.static.quantize_nodes import QuantizeNodes, step_of
from te_export.rewrite.edit import Edit

__all__ = ["convert_convolutions"]


def convert_convolutions(
    graph: ir.Graph, found: Sequence[Convolution], ranges: Mapping[str, LayerRange], weights: ConvWeights
) -> None:
    """Convert convolutions in place.

    Args:
        found: in the order of the graph.
        ranges: by the name of the weight.
        weights: the store of the variant.
    """
    edit = Edit(graph)
    nodes = QuantizeNodes(edit)
    rounded: dict[tuple[ir.Value, Range], ir.Value] = {}
    for conv in found:
        span, x, name = ranges[conv.name], conv.x, str(conv.node.name)
        if (x, span.input) not in rounded:
            rounded[x, span.input] = nodes.rounded(x, span.input, name=f"{name}.input")
        tensors = weights.of_convolution(conv.name, conv.weight, conv.bias, step_of(span.input))
        inputs = [
            rounded[x, span.input],
            nodes.dequantized(tensors.weight, tensors.scales),
            nodes.dequantized(tensors.bias, tensors.bias_scales),
        ]
        y = edit.again(conv.node, inputs, name=f"{name}.int8")
        out = nodes.rounded(y, span.output, name=f"{name}.output")
        edit.replace(conv.output if _within_limits(conv, span.output) else conv.node.outputs[0], out)
        rounded[out, span.output] = out
    edit.done()


def _within_limits(conv: Convolution, span: Range) -> bool:
    """Whether values cut off at the ends of a range are within the convolution's limits.

    They are not where another graph reads what is before the limits, and the range is that of both.
    """
    limits = conv.limits
    return limits is not None and limits.low <= span.low and span.high <= limits.high

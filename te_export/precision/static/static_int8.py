"""Weights and activations in 8 bits, with scales measured beforehand, in standard operators.

    y = Relu(Gemm(x, W, b))  →  Q, DQ → Conv(DQ(W int8), DQ(b int32)) → Relu → Q, DQ     on (1, C, B) values

Q and DQ are QuantizeLinear and DequantizeLinear. onnxruntime runs DQ → Conv → Relu → Q as one QLinearConv,
which on a CPU was measured faster than the same with Gemm; K equal layers side by side are one convolution
of K groups. Values stay (1, C, B) from layer to layer and are laid out anew where a float32 operator reads;
the transposes are of the kind that onnxruntime, which lays out (1, B, C) within, cancels. Any activation but
Relu is computed in float32 between Q, DQ of what it reads and Q, DQ of what it gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from te_export.precision.embedding_tables import TableWeights
from te_export.precision.layers import weight_names
from te_export.precision.static.activation_ranges import ActivationRanges, LayerRange, Range
from te_export.precision.static.conv_layers import ConvLayer, joined_by, plan_layers
from te_export.precision.static.conv_weights import ConvTensors, ConvWeights
from te_export.precision.static.convolutions import convolutions
from te_export.precision.static.quantize_nodes import QuantizeNodes, known_axes, step_of
from te_export.precision.static.static_convolutions import convert_convolutions
from te_export.rewrite.edit import Edit
from te_export.rewrite.linear import Linear
from te_export.rewrite.pieces import pieces_of
from te_runtime.manifest import FormName

__all__ = ["StaticInt8", "count_int8_convolutions"]


class StaticInt8:
    """The form `static`."""

    def __init__(self, ranges: ActivationRanges) -> None:
        """Make the form of one variant.

        Args:
            ranges: measured on the joint graph of the graphs that will be converted.
        """
        self._ranges = ranges.layers
        self._weights = ConvWeights()
        self._tables = TableWeights(8)

    @property
    def name(self) -> FormName:
        """`static`."""
        return "static"

    @property
    def kept_as(self) -> str:
        """`float32`."""
        return "float32"

    def convert(self, model: ir.Model, kept: frozenset[str]) -> tuple[str, ...]:
        """As Form.convert. What the joint graph stacks with a kept weight is kept in every graph."""
        found = [conv for conv in convolutions(model.graph) if conv.name in self._ranges.keys() - kept]
        convert_convolutions(model.graph, found, self._ranges, self._weights)
        layers = plan_layers(model.graph, partial(self._spans, kept=kept))
        conversion = _Conversion(Edit(model.graph), self._weights)
        for layer in layers:
            conversion.add(layer, self._ranges[layer.weights[0]])
        conversion.done()
        tables = self._tables.convert(model, kept)
        linears = [name for layer in layers for name in layer.weights]
        return tuple(dict.fromkeys([*tables, *(conv.name for conv in found), *linears]))

    def _spans(self, linear: Linear, *, kept: frozenset[str]) -> tuple[Range, Range] | None:
        """What a layer reads and gives; None if it is to stay in float32, or was not measured as one layer."""
        names = weight_names(linear)
        found = [self._ranges[name] for name in names if name in self._ranges]
        spans = {(span.input, span.output) for span in found}
        if len(found) < len(names) or len(spans) > 1:
            return None
        return spans.pop() if all(kept.isdisjoint(span.together) for span in found) else None


def count_int8_convolutions(graph: ir.Graph) -> int:
    """How many convolutions of a graph read int8 weights."""
    return sum(node.op_type == "Conv" and _is_int8(node.inputs[1]) for node in graph)


def _is_int8(weight: ir.Value | None) -> bool:
    node = None if weight is None else weight.producer()
    source = None if node is None or node.op_type != "DequantizeLinear" else node.inputs[0]
    return source is not None and source.dtype == ir.DataType.INT8


@dataclass(frozen=True)
class _Cube:
    """A value as (1, C, B) float32.

    Attributes:
        span: the range it was dequantized from; None if it was not.
    """

    value: ir.Value
    span: Range | None = None


@dataclass(frozen=True)
class _Exit:
    """What takes the place of a layer's output (B, N), and the same as (1, B, N) if there is such a value."""

    flat: ir.Value
    turned: ir.Value | None = None


class _Conversion:
    """The change of one graph. Cubes are known by the values (B, C) that they hold side by side."""

    def __init__(self, edit: Edit, weights: ConvWeights) -> None:
        self._edit = edit
        self._weights = weights
        self._cubes: dict[tuple[ir.Value, ...], _Cube] = {}
        self._inputs: dict[tuple[tuple[ir.Value, ...], Range], _Cube] = {}
        self._nodes = QuantizeNodes(edit)
        self._axis: ir.Value | None = None
        self._exits: dict[ir.Value, _Exit] = {}

    def add(self, layer: ConvLayer, span: LayerRange) -> None:
        """Add the convolution of one layer; what it reads has been added before."""
        edit = self._edit
        x = self._input(layer, span.input)
        out = self._conv(layer, x, self._weights.of(layer.linears, step_of(span.input)))
        fused = layer.followed_by_relu and span.output.low == 0
        if fused:
            out = edit.add("Relu", [out], known_axes(out), name=f"{layer.name}.relu")
        cube = self._rounded(out, span.output, name=f"{layer.name}.output")
        if layer.activation is not None and not fused:
            cube = _Cube(edit.like(layer.activation, cube.value, name=f"{layer.name}.activation"))
        self._cubes[layer.outputs] = cube
        self._leave(layer, cube)

    def done(self) -> None:
        """Let what was read of the layers be read of the convolutions.

        A Reshape reads past the Squeeze: on small batches every node counts.
        """
        for old, left in self._exits.items():
            if left.turned is not None:
                for node in [node for node, index in old.uses() if index == 0 and _reshapes(node)]:
                    node.replace_input_with(0, left.turned)
            self._edit.replace(old, left.flat)
        self._edit.done()

    def _input(self, layer: ConvLayer, span: Range) -> ir.Value:
        key = (layer.inputs, span)
        if key not in self._inputs:
            cube = self._cube(layer)
            if cube.span != span:
                cube = self._rounded(cube.value, span, name=f"{layer.name}.input")
            self._inputs[key] = cube
        return self._inputs[key].value

    def _cube(self, layer: ConvLayer) -> _Cube:
        """What a layer reads, side by side: from what was added before, or turned from (B, C)."""
        values = layer.inputs
        pieces = pieces_of(values) if len(values) > 1 else None
        if values not in self._cubes and pieces is not None:
            values = (pieces.whole,)
        if values not in self._cubes:
            (value,) = values  # a group reads pieces, or the outputs of one that was added before
            self._cubes[values] = _Cube(self._turned_in(value, layer))
        return self._cubes[values]

    def _turned_in(self, value: ir.Value, layer: ConvLayer) -> ir.Value:
        """(B, C) → (1, C, B)."""
        edit, axis = self._edit, self._first_axis()
        batch, width = layer.batch, layer.width_in
        cube = edit.add("Unsqueeze", [value, axis], (1, batch, width), name=f"{layer.name}.cube")
        return edit.add("Transpose", [cube], (1, width, batch), name=f"{layer.name}.turn", perm=[0, 2, 1])

    def _leave(self, layer: ConvLayer, cube: _Cube) -> None:
        """Give the layer's outputs, each and together, back to those that read (B, N)."""
        whole = self._turned_out(cube, layer)
        if len(layer.outputs) == 1:
            self._exits[layer.outputs[0]] = whole
            return
        for joined in joined_by(layer.outputs):
            self._cubes[joined,] = cube
            self._exits[joined] = whole
        sizes = [linear.width_out for linear in layer.linears]
        pieces = self._edit.split(whole.flat, sizes, batch=layer.batch, name=f"{layer.name}.split")
        self._exits.update(zip(layer.outputs, map(_Exit, pieces), strict=True))

    def _turned_out(self, cube: _Cube, layer: ConvLayer) -> _Exit:
        """(1, C, B) → (1, B, C) → (B, C)."""
        edit, name, axes = self._edit, layer.name, (layer.batch, layer.width_out)
        turned = edit.add("Transpose", [cube.value], (1, *axes), name=f"{name}.turn_back", perm=[0, 2, 1])
        flat = edit.add("Squeeze", [turned, self._first_axis()], axes, name=f"{name}.flat")
        return _Exit(flat, turned)

    def _conv(self, layer: ConvLayer, x: ir.Value, tensors: ConvTensors) -> ir.Value:
        weight = self._nodes.dequantized(tensors.weight, tensors.scales)
        bias = self._nodes.dequantized(tensors.bias, tensors.bias_scales)
        axes = (1, layer.width_out, layer.batch)
        groups = len(layer.linears)
        return self._edit.add(
            "Conv", [x, weight, bias], axes, name=layer.name, group=groups, kernel_shape=[1]
        )

    def _rounded(self, value: ir.Value, span: Range, *, name: str) -> _Cube:
        return _Cube(self._nodes.rounded(value, span, name=name), span)

    def _first_axis(self) -> ir.Value:
        if self._axis is None:
            self._axis = self._edit.integers([0], name="static.axis")
        return self._axis


def _reshapes(node: ir.Node) -> bool:
    """Whether it is a Reshape to a constant shape that takes over no axis by its position."""
    shape = node.inputs[1] if node.op_type == "Reshape" else None
    return shape is not None and shape.const_value is not None and bool(shape.const_value.numpy().all())

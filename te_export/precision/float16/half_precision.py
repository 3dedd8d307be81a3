"""Weights and activations in float16, for GPUs; inputs, outputs and gates in float32.

    x float32 → Cast → Gemm(x, W.half, b.half) → … → y.half → Cast → y float32
    l float16 → Cast → Softmax → w float32, the routing weights output → Cast → fusion

Each value is cast at most once in each direction, and only where a float32 and a float16 node meet. Which
nodes stay in float32 is float32_nodes.py's to say.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from te_export.errors import GateError
from te_export.precision.float16.float32_nodes import float32_nodes, is_weight
from te_export.precision.float16.half_weights import HalfWeights, parts_of
from te_export.rewrite.edit import Edit, axes_of

__all__ = ["HalfPrecision"]

_SHOWN_WEIGHTS = 8


class HalfPrecision:
    """The form `half`."""

    def __init__(self) -> None:
        self._weights = HalfWeights()

    @property
    def name(self) -> Literal["half"]:
        """`half`."""
        return "half"

    @property
    def kept_as(self) -> str:
        """`float32`."""
        return "float32"

    def convert(self, model: ir.Model, kept: frozenset[str]) -> tuple[str, ...]:
        """As Form.convert.

        Weights of any size and of any operator are converted; biases too, though they are not named.

        Raises:
            GateError: float16 cannot hold a weight or bias that is not in `kept` (either may be named there), or
                the graph has a node or value of a kind that is not handled. The graph is as it was.
        """
        _check_graph(model.graph)
        float32 = float32_nodes(model.graph, kept)
        read = dict.fromkeys(
            value for node in model.graph if node not in float32 for value in node.inputs if value is not None
        )
        weights = [value for value in read if is_weight(value)]
        self._check_weights(weights)
        edit = Edit(model.graph)
        tensors = {value: self._weights.of(value) for value in weights}
        halves = {value: edit.initializer(half, name=str(half.name)) for value, half in tensors.items()}
        _retype(model.graph, edit, float32, halves)
        edit.done()
        parts = (part for value in weights for part in parts_of(value) if len(part.tensor.shape) > 1)
        return tuple(dict.fromkeys(part.name for part in parts))

    def _check_weights(self, weights: list[ir.Value]) -> None:
        parts = {part.name: part for value in weights for part in parts_of(value)}
        found = {name: problem for name, part in parts.items() if (problem := self._weights.problem(part))}
        if found:
            shown = [f"{name}: {problem}" for name, problem in list(found.items())[:_SHOWN_WEIGHTS]]
            raise GateError(
                f"float16 cannot hold {len(found)} of {len(parts)} weights: {'; '.join(shown)}"
                f"{'; …' if len(found) > len(shown) else ''}. Export without fp16, or train the layers to weights "
                "of common size."
            )


class _Casts:
    """The values of a graph in the type that a reader wants, each cast once."""

    def __init__(self, edit: Edit, halves: dict[ir.Value, ir.Value]) -> None:
        self._edit = edit
        self._halves = halves
        self._made: dict[ir.Value, ir.Value] = {}

    def of(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` as `dtype`; itself where it has that type, or is neither float32 nor float16."""
        if value in self._halves:
            return self._halves[value] if dtype == ir.DataType.FLOAT16 else value
        if value.dtype == dtype or value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            return value
        if value not in self._made:
            stem = "half" if dtype == ir.DataType.FLOAT16 else "whole"
            self._made[value] = self._cast(value, dtype, f"{value.name}.{stem}")
        return self._made[value]

    def show(self, value: ir.Value) -> ir.Value:
        """A float16 value as the float32 output that takes over its name."""
        shown = self._made[value] = self._cast(value, ir.DataType.FLOAT, f"{value.name}.half")
        value.name, shown.name = shown.name, value.name
        return shown

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        cast = self._edit.add("Cast", [value], axes_of(value) or (), name=name, dtype=dtype, to=int(dtype))
        cast.shape = None if value.shape is None else ir.Shape(value.shape)
        return cast


def _retype(
    graph: ir.Graph, edit: Edit, float32: frozenset[ir.Node], halves: dict[ir.Value, ir.Value]
) -> None:
    """Let every node but those of `float32` read and give float16; the nodes are sorted, so that each finds
    its inputs in their final types.
    """
    casts = _Casts(edit, halves)
    for node in list(graph):
        dtype = ir.DataType.FLOAT if node in float32 else ir.DataType.FLOAT16
        for index, value in enumerate(node.inputs):
            if value is not None:
                node.replace_input_with(index, casts.of(value, dtype))
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and dtype == ir.DataType.FLOAT16:
                value.type = ir.TensorType(dtype)
                _show_outputs(graph, casts, value)


def _show_outputs(graph: ir.Graph, casts: _Casts, value: ir.Value) -> None:
    """Where the graph gives `value`, let it give its float32 cast."""
    if value.is_graph_output():
        shown = casts.show(value)
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = shown


def _check_graph(graph: ir.Graph) -> None:
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                raise GateError(
                    f"{graph.name}: node {node.name!r} ({node.op_type}) holds a graph of its own, which cannot be "
                    "turned into float16; expected forms to be applied before graphs are put together"
                )
        for value in node.outputs:
            if value.dtype is None and value.uses():
                raise GateError(
                    f"{graph.name}: value {value.name!r} of node {node.name!r} ({node.op_type}) has no type, so "
                    "whether it becomes float16 cannot be told; expected one from the capture"
                )

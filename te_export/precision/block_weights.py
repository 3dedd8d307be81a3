"""Weights in blocks of 8 or 4 bits, activations quantized as they come: no data is needed.

    y = Gemm(x, W, b)  →  y = MatMulNBits(x, q, scales, b)     com.microsoft, computing in int8

onnxruntime quantizes each row of x by itself, block by block, so a row's answer does not depend on the rows
that share its batch. The standard DynamicQuantizeLinear takes one scale from the whole batch instead: one
row a hundred times as large as the others cost the others 1.45 times their own spread, measured on R.
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from te_export.precision.embedding_tables import TableWeights
from te_export.precision.integer_weights import CONTRIB_DOMAIN, Bits, IntegerWeights, quantize_blocks
from te_export.precision.layers import linear_layers, weight_names
from te_export.rewrite.edit import Edit
from te_export.rewrite.linear import Linear
from te_runtime.manifest import FormName

__all__ = ["BlockWeights"]

_BLOCK: dict[Bits, int] = {8: 128, 4: 32}
_COMPUTE_IN_INT8 = 4


class BlockWeights:
    """The form `dynamic` (8 bits, blocks of 128) or `block4` (4 bits, blocks of 32).

    In `block4`, kept layers have 8 bits: that was found exact enough, and float32 would make the variant larger
    than int8.
    """

    def __init__(self, bits: Bits) -> None:
        self._bits = bits
        self._weights = {
            width: IntegerWeights(partial(quantize_blocks, bits=width, block=block), f"blocks{width}")
            for width, block in _BLOCK.items()
        }
        self._tables = TableWeights(bits)

    @property
    def name(self) -> FormName:
        """`dynamic` or `block4`."""
        return "dynamic" if self._bits == 8 else "block4"

    @property
    def kept_as(self) -> str:
        """As Form.kept_as."""
        return "float32" if self._bits == 8 else "8 bits"

    def convert(self, model: ir.Model, kept: frozenset[str]) -> tuple[str, ...]:
        """As Form.convert."""
        converted: list[str] = []
        edit = Edit(model.graph)
        there: dict[str, ir.Value] = {}
        for linear in list(linear_layers(model.graph)):
            names = weight_names(linear)
            is_kept = not kept.isdisjoint(names)
            if is_kept and self._bits == 8:
                continue
            edit.replace(linear.y, self._matmul(edit, linear, 8 if is_kept else self._bits, there))
            converted += names
        edit.done()
        if converted:
            model.opset_imports[CONTRIB_DOMAIN] = 1
        return tuple(dict.fromkeys([*self._tables.convert(model, kept), *converted]))

    def _matmul(self, edit: Edit, linear: Linear, bits: Bits, there: dict[str, ir.Value]) -> ir.Value:
        """Add the product; `there` holds the constants of the graph, which layers of one weight share."""
        weight = self._weights[bits].of(linear)
        for tensor in (weight.values, weight.scales):
            name = str(tensor.name)
            if name not in there:
                there[name] = edit.initializer(tensor, name=name)
        values, scales = (there[str(tensor.name)] for tensor in (weight.values, weight.scales))
        x = linear.node.inputs[0]  # what it reads now: a layer before it may have been converted
        inputs = [x, values, scales, None, None, linear.bias]
        return edit.add(
            "MatMulNBits",
            inputs,
            linear.axes,
            name=f"{linear.name}.blocks",
            domain=CONTRIB_DOMAIN,
            K=linear.width_in,
            N=linear.width_out,
            bits=bits,
            block_size=_BLOCK[bits],
            accuracy_level=_COMPUTE_IN_INT8,
        )

"""Writing QuantizeLinear and DequantizeLinear into a graph, with one scale for each range."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from te_export.precision.static.activation_ranges import Range
from te_export.rewrite.edit import Axes, Edit, axes_of

__all__ = ["QuantizeNodes", "known_axes", "step_of"]

_STEPS = 255


class QuantizeNodes:
    """What one change of a graph adds; constants that are the same are added once."""

    def __init__(self, edit: Edit) -> None:
        self._edit = edit
        self._constants: dict[str, ir.Value] = {}
        self._scales: dict[Range, tuple[ir.Value, ir.Value]] = {}

    def rounded(self, value: ir.Value, span: Range, *, name: str) -> ir.Value:
        """A float32 value of known shape, quantized to uint8 over `span` and dequantized again."""
        edit, axes = self._edit, known_axes(value)
        scale, zero = self._scale(span, name=name)
        steps = edit.add(
            "QuantizeLinear", [value, scale, zero], axes, name=f"{name}.quantize", dtype=ir.DataType.UINT8
        )
        return edit.add("DequantizeLinear", [steps, scale, zero], axes, name=f"{name}.dequantize")

    def dequantized(self, values: ir.TensorProtocol, scales: ir.TensorProtocol) -> ir.Value:
        """Constant integers as float32, with a scale for each index of the first axis."""
        inputs = [self.constant(values), self.constant(scales)]
        axes = tuple(int(axis) for axis in values.shape.numpy())
        return self._edit.add("DequantizeLinear", inputs, axes, name=f"{values.name}.float", axis=0)

    def constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        """The initializer of a tensor that has a name."""
        name = str(tensor.name)
        if name not in self._constants:
            self._constants[name] = self._edit.initializer(tensor, name=name)
        return self._constants[name]

    def _scale(self, span: Range, *, name: str) -> tuple[ir.Value, ir.Value]:
        if span not in self._scales:
            zero = int(np.clip(np.rint(-span.low / step_of(span)), 0, _STEPS))
            self._scales[span] = (
                self._edit.initializer(ir.tensor(np.float32(step_of(span))), name=f"{name}.scale"),
                self._edit.initializer(ir.tensor(np.uint8(zero)), name=f"{name}.zero"),
            )
        return self._scales[span]


def step_of(span: Range) -> float:
    """What one of the 255 steps of a range stands for, in float32; 1 where nothing but zero was met."""
    step = np.float32((span.high - span.low) / _STEPS)
    return float(step) if step >= np.finfo(np.float32).tiny else 1.0


def known_axes(value: ir.Value) -> Axes:
    """The shape of a value whose shape is known."""
    axes = axes_of(value)
    assert axes is not None
    return axes

"""Weights in float16, each converted once, however many graphs read it.

    w (…) float32 → w.half (…) float16, rounded to nearest

A stack becomes the stack of what its parts became, so joint and task graphs go on sharing bytes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from te_export.rewrite.linear import tensor_of
from te_export.rewrite.stack import Part, stack_of, stack_tensors

__all__ = ["HalfWeights", "is_beyond_float16", "parts_of"]

_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)


class HalfWeights:
    """Converts the weights of one variant, each once, and keeps them."""

    def __init__(self) -> None:
        self._made: dict[str, ir.TensorProtocol] = {}
        self._largest: dict[str, float] = {}

    def of(self, value: ir.Value) -> ir.TensorProtocol:
        """The tensor of a float32 initializer in float16; part by part where it is a stack.

        `problem` is to be asked of its parts first: what float16 cannot hold becomes infinite or zero.
        """
        stack = stack_of(tensor_of(value))
        parts = [Part(f"{part.name}.half", self._single(part)) for part in parts_of(value)]
        return parts[0].tensor if stack is None else stack_tensors(f"{value.name}.half", parts, stack.axes)

    def problem(self, part: Part) -> str | None:
        """What float16 cannot hold of a weight; None if it holds it.

        Values that vanish beside larger ones are no problem: the error they make is below the rounding of those.
        Nor is a bias that vanishes: it is added to what the weights give, and they are looked at themselves.
        """
        if part.name not in self._largest:
            self._largest[part.name] = float(np.abs(part.tensor.numpy()).max(initial=0))
        largest = self._largest[part.name]
        with np.errstate(over="ignore"):
            rounded = np.float16(largest)
        found = f"its largest magnitude is {largest:.3g}, and float16"
        if not np.isfinite(rounded):
            return f"{found} ends at {_LARGEST:.0f}"
        if len(part.tensor.shape) > 1 and largest > 0 and rounded < _SMALLEST_NORMAL:
            return f"{found} loses digits below {_SMALLEST_NORMAL:.3g}"
        return None

    def _single(self, part: Part) -> ir.TensorProtocol:
        if part.name not in self._made:
            values = part.tensor.numpy().astype(np.float16)
            self._made[part.name] = ir.tensor(values, name=f"{part.name}.half")
        return self._made[part.name]


def is_beyond_float16(value: ir.Value) -> bool:
    """Whether `value` is a float32 initializer with a magnitude that float16 has no number for."""
    tensor = value.const_value if value.is_initializer() else None
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return False
    return bool(np.abs(tensor.numpy()).max(initial=0) > _LARGEST)


def parts_of(value: ir.Value) -> tuple[Part, ...]:
    """The parts of the stack that an initializer is, or itself as the only one."""
    tensor = tensor_of(value)
    stack = stack_of(tensor)
    return (Part(str(value.name), tensor),) if stack is None else stack.parts

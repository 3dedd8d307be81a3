"""Weights as integers, symmetric around zero, with a scale for each row or for each block of a row.

    row form:    w (N, K) float32 → q (N, K) int8, |q| <= 63, scales (N,) float32;  w ≈ q · scales[:, None]
    block form:  w (N, K) float32 → q (N, ceil(K / block), block · bits / 8) uint8 around 2^(bits - 1),
                 scales (N · ceil(K / block),) float32, as com.microsoft.MatMulNBits reads them

Rows are quantized by themselves, so a stack of weights is the stack of what its parts became, byte for byte,
and joint and task graphs go on sharing them. Each weight is converted once, however many graphs read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from te_export.rewrite.linear import Linear, tensor_of
from te_export.rewrite.stack import Part, stack_of, stack_tensors

__all__ = [
    "CONTRIB_DOMAIN",
    "LARGEST_IN_ROWS",
    "Bits",
    "IntegerWeights",
    "QuantizedWeight",
    "quantize_blocks",
    "quantize_rows",
    "weight_key",
]

CONTRIB_DOMAIN = "com.microsoft"
"""Where onnxruntime keeps its operators on blocks."""

LARGEST_IN_ROWS = 63
"""Not 127: on x86 CPUs without VNNI onnxruntime adds two products of a uint8 and an int8 in 16 bits, and
2 · 255 · 127 saturates there without a word, where 2 · 255 · 63 fits. On R the eighth bit would take a fifth off
the squared error."""
Bits = Literal[8, 4]
Arrays = tuple[NDArray[np.generic], NDArray[np.float32]]


@dataclass(frozen=True)
class QuantizedWeight:
    """The integers and the scales of one weight, as tensors to make initializers of."""

    values: ir.TensorProtocol
    scales: ir.TensorProtocol


class IntegerWeights:
    """Quantizes the weights of one variant, each once, and keeps them."""

    def __init__(self, quantize: Callable[[NDArray[np.float32]], Arrays], suffix: str) -> None:
        """Make an empty store.

        Args:
            quantize: weight (N, K) → values (N, …) and scales, (N,) or (N · blocks,), row by row.
            suffix: what the names of the values end in, such as `int8`.
        """
        self._quantize = quantize
        self._suffix = suffix
        self._made: dict[str, QuantizedWeight] = {}

    def of(self, linear: Linear) -> QuantizedWeight:
        """The weight of a layer, as (out, in), quantized; part by part where it is a stack."""
        stack = stack_of(tensor_of(linear.weight))
        name = weight_key(linear)
        if stack is None:
            return self._single(name, linear.weight_out_in)
        parts = [self._single(part.name, part.tensor.numpy) for part in stack.parts]
        return self.stacked(name, parts)

    def stacked(self, name: str, parts: list[QuantizedWeight]) -> QuantizedWeight:
        """Several quantized weights, one below the other."""
        return QuantizedWeight(
            _stack(f"{name}.{self._suffix}", [part.values for part in parts]),
            _stack(f"{name}.{self._suffix}.scales", [part.scales for part in parts]),
        )

    def _single(self, name: str, weight: Callable[[], NDArray[np.float32]]) -> QuantizedWeight:
        if name not in self._made:
            values, scales = self._quantize(np.asarray(weight(), np.float32))
            self._made[name] = QuantizedWeight(
                ir.tensor(values, name=f"{name}.{self._suffix}"),
                ir.tensor(scales, name=f"{name}.{self._suffix}.scales"),
            )
        return self._made[name]


def weight_key(linear: Linear) -> str:
    """What the integers of a layer's weight are kept under: one that is read both ways round becomes two."""
    return f"{linear.weight.name}.in_out" if linear.turned else str(linear.weight.name)


def quantize_rows(
    weight: NDArray[np.float32],
    smallest: NDArray[np.float32] | float = 0.0,
    *,
    largest: int = LARGEST_IN_ROWS,
) -> Arrays:
    """Quantize (N, K) to int8 (N, K) and scales (N,); a row of zeros gets scale 1.

    Args:
        smallest: what a scale is at least, (N,) or one for all rows.
        largest: the largest magnitude of a value; more than LARGEST_IN_ROWS where nothing is multiplied in integers.
    """
    scales = np.maximum(_scales(weight, largest), np.float32(smallest))
    values = np.clip(np.rint(weight / scales[:, None]), -largest, largest).astype(np.int8)
    return values, scales


def quantize_blocks(weight: NDArray[np.float32], *, bits: int, block: int) -> Arrays:
    """Quantize (N, K) to the layout of com.microsoft.MatMulNBits.

    Args:
        bits: 8 or 4; two 4-bit values share a byte, the first in the lower half.
        block: values along K that share a scale; the last block is filled up with zeros.

    Returns:
        uint8 (N, ceil(K / block), block · bits / 8), and scales (N · ceil(K / block),).
    """
    rows, width = weight.shape
    blocks = -(-width // block)
    padded = np.zeros((rows * blocks, block), np.float32)
    padded.reshape(rows, blocks * block)[:, :width] = weight
    middle = 1 << (bits - 1)
    scales = _scales(padded, middle - 1)
    values = (np.clip(np.rint(padded / scales[:, None]), 1 - middle, middle - 1) + middle).astype(np.uint8)
    packed = values if bits == 8 else np.bitwise_or(values[:, 0::2], np.left_shift(values[:, 1::2], 4))
    return packed.reshape(rows, blocks, -1), scales


def _scales(rows: NDArray[np.float32], largest: int) -> NDArray[np.float32]:
    """One scale per row, so that its largest magnitude becomes `largest`."""
    scales: NDArray[np.float32] = (np.abs(rows).max(axis=1) / largest).astype(np.float32)
    scales[scales == 0] = 1.0
    return scales


def _stack(name: str, tensors: list[ir.TensorProtocol]) -> ir.TensorProtocol:
    first = tensors[0].shape.numpy()
    rows = sum(int(tensor.shape.numpy()[0]) for tensor in tensors)
    parts = [Part(str(tensor.name), tensor) for tensor in tensors]
    return stack_tensors(name, parts, (rows, *first[1:]))

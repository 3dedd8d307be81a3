"""Weights and biases of convolutions in integers; linear layers are convolutions of one place.

    w (N, …) float32 → int8 (N, …) and scales (N,);  b (N,) float32 → int32 (N,), scales input_scale · w's
    w (N, K) of a linear layer → int8 (N, K, 1)

Each layer is quantized once, however many graphs read it, and a group or stack is the bytes of its layers one
after another, so that graphs go on sharing them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import count

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from te_export.precision.integer_weights import quantize_rows, weight_key
from te_export.rewrite.edit import joined_name
from te_export.rewrite.linear import Linear, tensor_of
from te_export.rewrite.stack import Part, stack_of, stack_tensors

__all__ = ["ConvTensors", "ConvWeights"]

_LARGEST_BIAS = 2**30


@dataclass(frozen=True)
class ConvTensors:
    """Weight (N, …) int8, its scales (N,) float32, bias (N,) int32, its scales (N,) float32."""

    weight: ir.TensorProtocol
    scales: ir.TensorProtocol
    bias: ir.TensorProtocol
    bias_scales: ir.TensorProtocol


@dataclass(frozen=True)
class _Leaf:
    """One layer as it is alone: what was quantized, and what became of it."""

    bias: NDArray[np.float32]
    tensors: ConvTensors


class ConvWeights:
    """The integer weights of one variant, each made once."""

    def __init__(self) -> None:
        self._made: dict[str, _Leaf] = {}

    def of(self, linears: Sequence[Linear], input_scale: float) -> ConvTensors:
        """The tensors of one layer, or of the layers of a group one after another.

        Args:
            input_scale: what a step of the layers' input stands for; the same in all graphs.
        """
        parts = [
            (name, self._leaf(name, weight, bias, input_scale).tensors)
            for linear in linears
            for name, weight, bias in _parts(linear)
        ]
        if len(parts) == 1:
            return parts[0][1]
        name = joined_name([name for name, _ in parts])
        return ConvTensors(
            *(
                _stack(f"{name}.{field.name}", [getattr(tensors, field.name) for _, tensors in parts])
                for field in fields(ConvTensors)
            )
        )

    def of_convolution(
        self, name: str, weight: ir.Value, bias: ir.Value | None, input_scale: float
    ) -> ConvTensors:
        """The tensors of a convolution.

        Args:
            name: of the weight.
            weight: (N, channels / groups, kernel …).
            bias: (N,); None for zeros.
            input_scale: as in `of`.
        """
        values = tensor_of(weight)
        shift = (
            np.zeros(int(values.shape.numpy()[0]), np.float32) if bias is None else tensor_of(bias).numpy()
        )
        return self._leaf(name, values.numpy, shift, input_scale).tensors

    def _leaf(
        self, name: str, weight: Callable[[], NDArray[np.float32]], bias: NDArray[np.float32], step: float
    ) -> _Leaf:
        """A weight that layers with different biases share is made for each of them."""
        for number in count(1):
            key = name if number == 1 else f"{name}#{number}"
            if key not in self._made:
                self._made[key] = _Leaf(bias, _quantize(key, np.asarray(weight(), np.float32), bias, step))
            if np.array_equal(self._made[key].bias, bias):
                return self._made[key]
        raise AssertionError  # count does not end


def _parts(linear: Linear) -> Iterator[tuple[str, Callable[[], NDArray[np.float32]], NDArray[np.float32]]]:
    """Name, weight (N, K) and bias (N,) of each layer that is stacked in one; of itself if it is no stack."""
    stack = stack_of(tensor_of(linear.weight))
    zeros = np.zeros(linear.width_out, np.float32)
    bias = zeros if linear.bias is None else tensor_of(linear.bias).numpy()
    if stack is None:
        yield weight_key(linear), linear.weight_out_in, bias
        return
    start = 0
    for part in stack.parts:
        end = start + int(part.tensor.shape.numpy()[0])
        yield part.name, part.tensor.numpy, bias[start:end]
        start = end


def _quantize(
    name: str, weight: NDArray[np.float32], bias: NDArray[np.float32], input_scale: float
) -> ConvTensors:
    smallest = (np.abs(bias, dtype=np.float64) / (input_scale * _LARGEST_BIAS)).astype(np.float32)
    values, scales = quantize_rows(weight.reshape(len(weight), -1), smallest)
    places = weight.shape if weight.ndim > 2 else (*weight.shape, 1)
    bias_scales = (np.float32(input_scale) * scales).astype(np.float32)
    steps = np.rint(bias / np.where(bias_scales == 0, 1, bias_scales).astype(np.float64)).astype(np.int32)
    return ConvTensors(
        ir.tensor(values.reshape(places), name=f"{name}.int8"),
        ir.tensor(scales, name=f"{name}.scales"),
        ir.tensor(steps, name=f"{name}.bias"),
        ir.tensor(bias_scales, name=f"{name}.bias_scales"),
    )


def _stack(name: str, tensors: Sequence[ir.TensorProtocol]) -> ir.TensorProtocol:
    first = tensors[0].shape.numpy()
    rows = sum(int(tensor.shape.numpy()[0]) for tensor in tensors)
    parts = [Part(str(tensor.name), tensor) for tensor in tensors]
    return stack_tensors(name, parts, (rows, *first[1:]))

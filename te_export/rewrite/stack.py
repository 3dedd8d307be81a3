"""A tensor that is the byte concatenation of others: row-stacked weights, without copying them.

    parts (r_0, n), (r_1, n), …  → stack (Σ r_i, n), or (T, r, n) where all parts have the same shape

The parts keep the names of the initializers they were, so that weights.bin can hold the stack once and
every graph that reads a part alone names its range of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import DTypeLike, NDArray

__all__ = ["Part", "Stack", "stack_of", "stack_tensors"]


@dataclass(frozen=True)
class Part:
    """One tensor of a stack, and the name of the initializer it is elsewhere."""

    name: str
    tensor: ir.TensorProtocol


@dataclass(frozen=True)
class Stack:
    """What stands behind a stacked ir.Tensor; its numpy values are made when they are asked for."""

    parts: tuple[Part, ...]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.axes

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[np.generic]:
        del copy  # it is always one
        joined: NDArray[np.generic] = np.concatenate([part.tensor.numpy().reshape(-1) for part in self.parts])
        return joined.reshape(self.axes).astype(dtype or joined.dtype, copy=False)


def stack_tensors(name: str, parts: Sequence[Part], axes: Sequence[int]) -> ir.Tensor[Stack]:
    """The tensor of shape `axes` whose bytes are those of `parts`, one after another.

    A part that is a stack itself is taken apart, so that its own parts stay ranges of the bytes.
    """
    flat = [inner for part in parts for inner in _flat(part)]
    return ir.Tensor(Stack(tuple(flat), tuple(axes)), parts[0].tensor.dtype, shape=ir.Shape(axes), name=name)


def stack_of(tensor: ir.TensorProtocol | None) -> Stack | None:
    """What stands behind a stacked tensor; None for any other."""
    raw = getattr(tensor, "raw", None)
    return raw if isinstance(raw, Stack) else None


def _flat(part: Part) -> Sequence[Part]:
    stack = stack_of(part.tensor)
    return (part,) if stack is None else stack.parts

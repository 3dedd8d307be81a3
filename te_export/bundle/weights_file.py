"""weights.bin: every initializer above a small size, once, for all graphs of a variant.

A stack (rewrite/stack.py) is laid out as one tensor, and its parts as the ranges of bytes they are in it. A stack
whose parts already lie one after another is the range of bytes that they are together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from te_export.rewrite.stack import stack_of

__all__ = ["WeightsLayout", "plan_weights", "weight_chunks"]

SMALL_BYTES = 256
"""Smaller tensors stay in the graphs: pointing to them would take as many bytes."""
PAGE_BYTES = 4096
SMALL_ALIGNMENT = 64
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class WeightsLayout:
    """What weights.bin holds.

    Attributes:
        places: where each initializer lies: name → (offset, length), both in bytes. Parts of a stack lie
            inside it.
        written: the tensors that are written, in order, with their offsets.
    """

    places: Mapping[str, tuple[int, int]]
    written: tuple[tuple[int, ir.TensorProtocol], ...]
    size_bytes: int


def plan_weights(graphs: Sequence[ir.Graph]) -> WeightsLayout:
    """Lay out the initializers of all graphs, each name once; those of the first graph come first.

    int64 ones, which are shapes, stay in the graphs.

    A tensor of a page or more begins at a multiple of 4096 bytes, so that it can be mapped; a smaller one
    at a multiple of 64. The parts of a stack follow one another without gaps.
    """
    places: dict[str, tuple[int, int]] = {}
    parts: dict[str, tuple[int, int]] = {}
    written: list[tuple[int, ir.TensorProtocol]] = []
    end = 0
    for name, tensor in _tensors(graphs):
        if tensor.nbytes < SMALL_BYTES or tensor.dtype == ir.DataType.INT64 or name in places:
            continue
        lying = _range_of(tensor, parts)
        if lying is not None:
            places[name] = lying
            continue
        alignment = PAGE_BYTES if tensor.nbytes >= PAGE_BYTES else SMALL_ALIGNMENT
        offset = -(-end // alignment) * alignment
        places[name] = (offset, tensor.nbytes)
        written.append((offset, tensor))
        end = offset + tensor.nbytes
        for part, place in _places_inside(tensor, offset):
            parts.setdefault(part, place)
            if place[1] >= SMALL_BYTES:
                places.setdefault(part, place)
    return WeightsLayout(places=places, written=tuple(written), size_bytes=end)


def weight_chunks(layout: WeightsLayout) -> Iterator[bytes | memoryview]:
    """The bytes of weights.bin, little-endian, in pieces of a few MiB; no stack is ever whole in memory."""
    end = 0
    for offset, tensor in layout.written:
        if offset > end:
            yield bytes(offset - end)
        stack = stack_of(tensor)
        for part in (tensor,) if stack is None else (part.tensor for part in stack.parts):
            yield from _chunks(part)
        end = offset + tensor.nbytes


def _tensors(graphs: Sequence[ir.Graph]) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Stacks of all graphs before anything else, so that no part is written before the stack it belongs to."""
    for wanted in (True, False):
        for graph in graphs:
            for name, value in graph.initializers.items():
                assert value.const_value is not None  # initializers have values
                if (stack_of(value.const_value) is not None) == wanted:
                    yield name, value.const_value


def _places_inside(tensor: ir.TensorProtocol, offset: int) -> Iterator[tuple[str, tuple[int, int]]]:
    stack = stack_of(tensor)
    for part in () if stack is None else stack.parts:
        yield part.name, (offset, part.tensor.nbytes)
        offset += part.tensor.nbytes


def _range_of(tensor: ir.TensorProtocol, parts: Mapping[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Where the bytes of a stack already lie as a whole, if they do."""
    stack = stack_of(tensor)
    if stack is None or any(part.name not in parts for part in stack.parts):
        return None
    begin = end = parts[stack.parts[0].name][0]
    for part in stack.parts:
        offset, length = parts[part.name]
        if offset != end or length != part.tensor.nbytes:
            return None
        end += length
    return begin, end - begin


def _chunks(tensor: ir.TensorProtocol) -> Iterator[memoryview]:
    flat = np.ascontiguousarray(tensor.numpy()).reshape(-1)
    raw = flat.astype(flat.dtype.newbyteorder("<"), copy=False).view(np.uint8).data
    for start in range(0, tensor.nbytes, _CHUNK_BYTES):
        yield raw[start : start + _CHUNK_BYTES]

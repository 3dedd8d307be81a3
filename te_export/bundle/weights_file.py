"""weights.bin: every initializer above a small size, once, for all graphs of a variant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

__all__ = ["WeightsLayout", "plan_weights", "weight_chunks"]

SMALL_BYTES = 256
"""Smaller tensors stay in the graphs: pointing to them would take as many bytes."""
PAGE_BYTES = 4096
SMALL_ALIGNMENT = 64
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class WeightsLayout:
    """Where each initializer lies in weights.bin: name → (offset, length), both in bytes, in the order they
    are written.
    """

    places: Mapping[str, tuple[int, int]]
    size_bytes: int


def plan_weights(joint: ir.Graph) -> WeightsLayout:
    """Lay out the float initializers of the joint graph, which holds those of every other graph.

    A tensor of a page or more begins at a multiple of 4096 bytes, so that it can be mapped; a smaller one
    at a multiple of 64.
    """
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name, value in joint.initializers.items():
        tensor = value.const_value
        assert tensor is not None  # initializers have values
        if tensor.nbytes < SMALL_BYTES or tensor.dtype.is_integer():
            continue
        alignment = PAGE_BYTES if tensor.nbytes >= PAGE_BYTES else SMALL_ALIGNMENT
        offset = -(-end // alignment) * alignment
        places[name] = (offset, tensor.nbytes)
        end = offset + tensor.nbytes
    return WeightsLayout(places=places, size_bytes=end)


def weight_chunks(joint: ir.Graph, layout: WeightsLayout) -> Iterator[bytes | memoryview]:
    """The bytes of weights.bin, little-endian, in pieces of a few MiB; no tensor is copied whole."""
    end = 0
    for name, (offset, length) in layout.places.items():
        if offset > end:
            yield bytes(offset - end)
        tensor = joint.initializers[name].const_value
        assert tensor is not None  # it was laid out
        flat = np.ascontiguousarray(tensor.numpy()).reshape(-1)
        raw = flat.astype(flat.dtype.newbyteorder("<"), copy=False).view(np.uint8).data
        for start in range(0, length, _CHUNK_BYTES):
            yield raw[start : start + _CHUNK_BYTES]
        end = offset + length

"""A tensor where it lies, inside a graph or in weights.bin, read in blocks so that memory stays bounded.

Blocks come in an order that depends on the logical shape alone: a weight stored (out, in) and the same one stored
turned, (in, out), give equal blocks.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from te_runtime.bundle_files import ADVICE, file_path, open_regular
from te_runtime.errors import BundleError

__all__ = ["NUMPY_DTYPES", "StoredTensor"]

NUMPY_DTYPES: dict[str, np.dtype[np.generic]] = {
    "FLOAT": np.dtype("<f4"),
    "FLOAT16": np.dtype("<f2"),
    "DOUBLE": np.dtype("<f8"),
    "INT8": np.dtype("i1"),
    "UINT8": np.dtype("u1"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
}
"""What figures can be computed of; anything else is compared by its bytes alone."""

_BYTES = np.dtype("u1")
_TILE = 1024
_FLAT_BLOCK = _TILE * _TILE
_Read = Callable[[int, int], NDArray[np.generic]]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a graph.

    Attributes:
        kind: its ONNX data type, such as FLOAT.
        shape: as stored.
        inside: its bytes, where the graph holds them; None where they lie in a file.
        folder, file: the bundle, and the path of the file in it.
        file_sha256: of that file.
        offset, length: where in it, in bytes.
        turned: whether the stored shape is the transpose of the logical one.
    """

    kind: str
    shape: tuple[int, ...]
    inside: bytes | None = None
    folder: str = ""
    file: str = ""
    file_sha256: str = ""
    offset: int = 0
    length: int = 0
    turned: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """How to read its bytes; single bytes where numpy has no such numbers."""
        return NUMPY_DTYPES.get(self.kind, _BYTES)

    @property
    def is_measurable(self) -> bool:
        """Whether figures can be computed of its numbers."""
        return self.kind in NUMPY_DTYPES

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """As the layer has it: turned back."""
        return self.shape[::-1] if self.turned else self.shape

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """As the layer has it, without axes of one: a bias in a stack has one more of them."""
        return tuple(axis for axis in self.layer_shape if axis != 1)

    def slice(self, index: int, count: int) -> StoredTensor:
        """The `index`-th of `count` equal pieces along the first axis; an axis of one goes away."""
        rows = self.shape[0] // count
        shape = self.shape[1:] if rows == 1 and len(self.shape) > 1 else (rows, *self.shape[1:])
        if self.inside is not None:
            step = len(self.inside) // count
            return replace(self, shape=shape, inside=self.inside[index * step : (index + 1) * step])
        step = self.length // count
        return replace(self, shape=shape, offset=self.offset + index * step, length=step)

    def lies_as(self, other: StoredTensor) -> bool:
        """Whether both are the same bytes in the same order, told without reading a file."""
        if (self.kind, self.shape, self.turned) != (other.kind, other.shape, other.turned):
            return False
        if self.inside is not None or other.inside is not None:
            return self.inside == other.inside
        places = [(one.file_sha256, one.offset, one.length) for one in (self, other)]
        return places[0] == places[1]

    def blocks(self) -> Iterator[NDArray[np.generic]]:
        """Its elements, in flat blocks of at most 2^20; in an order that the logical shape alone decides.

        Raises:
            BundleError: the file ends before the tensor does, or cannot be read.
        """
        with self._reader() as read:
            if len(self.logical_shape) != 2 or not self.is_measurable:
                yield from self._flat(read)
            else:
                yield from self._tiles(read)

    def sha256(self) -> str:
        """Of its blocks: equal for equal tensors, however they are stored."""
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(np.ascontiguousarray(block).data)
        return digest.hexdigest()

    def _flat(self, read: _Read) -> Iterator[NDArray[np.generic]]:
        total = (self.length if self.inside is None else len(self.inside)) // self.dtype.itemsize
        for start in range(0, total, _FLAT_BLOCK):
            yield read(start, min(_FLAT_BLOCK, total - start))

    def _tiles(self, read: _Read) -> Iterator[NDArray[np.generic]]:
        rows, columns = self.logical_shape
        for top in range(0, rows, _TILE):
            height = min(_TILE, rows - top)
            for left in range(0, columns, _TILE):
                width = min(_TILE, columns - left)
                if self.turned:
                    yield _tile(read, rows, (left, width), (top, height)).T.reshape(-1)
                else:
                    yield _tile(read, columns, (top, height), (left, width)).reshape(-1)

    @contextmanager
    def _reader(self) -> Iterator[_Read]:
        if self.inside is not None:
            array = np.frombuffer(self.inside, dtype=self.dtype)
            yield lambda start, count: array[start : start + count]
            return
        with open_regular(self.folder, self.file) as (descriptor, _):
            yield lambda start, count: self._elements(descriptor, start, count)

    def _elements(self, descriptor: int, start: int, count: int) -> NDArray[np.generic]:
        wanted = count * self.dtype.itemsize
        os.lseek(descriptor, self.offset + start * self.dtype.itemsize, os.SEEK_SET)
        data = bytearray()
        while len(data) < wanted:
            chunk = os.read(descriptor, wanted - len(data))
            if not chunk:
                raise BundleError(
                    f"{file_path(self.folder, self.file)}: ends before byte {self.offset + self.length}, where a "
                    f"tensor ends: it was changed while it was read. {ADVICE}"
                )
            data += chunk
        return np.frombuffer(data, dtype=self.dtype)


def _tile(read: _Read, stride: int, rows: tuple[int, int], columns: tuple[int, int]) -> NDArray[np.generic]:
    """Rows and columns, each (first, count), of a matrix stored by rows of `stride` elements."""
    (top, height), (left, width) = rows, columns
    if width == stride:
        return read(top * stride, height * stride).reshape(height, width)
    return np.stack([read((top + row) * stride + left, width) for row in range(height)])

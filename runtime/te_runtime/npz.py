"""Reads .npy and .npz files of plain numbers, looking at every header before any data is taken into memory.

numpy.load would believe a header's shape and allocate for it, and would unpack an archive member of any size.
"""

from __future__ import annotations

import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from te_runtime.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ArraySpec", "read_npy", "read_npz"]

_SUFFIX = ".npy"
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,  # an encrypted member, or one compressed in a way that zipfile does not know
    RecursionError,
    MemoryError,
    SyntaxError,
    tokenize.TokenError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class ArraySpec:
    """What an array must be: its shape, None for an axis of any length, and its dtype's name."""

    shape: tuple[int | None, ...]
    dtype: str


def read_npy(path: Path) -> NDArray[np.generic]:
    """Read one array.

    Raises:
        InputError: not a .npy file, cut off, or not of plain numbers.
    """
    with _damage_named(path), path.open("rb") as file:
        return _read_array(file, os.fstat(file.fileno()).st_size, None)


def read_npz(
    path: Path, wanted: Mapping[str, ArraySpec] | None = None, *, limit_bytes: int | None = None
) -> dict[str, NDArray[np.generic]]:
    """Read the arrays of an archive.

    Args:
        path: the .npz file.
        wanted: the arrays to read, and what each must be; others in the archive are left alone. None reads
            all.
        limit_bytes: the most that the arrays may take together.

    Returns:
        The arrays by name, read-only.

    Raises:
        InputError: an array is missing or not as wanted, or the file is damaged, too large, or holds other
            things.
    """
    with _damage_named(path), zipfile.ZipFile(path) as archive:
        members = _members(archive)
        names = list(members if wanted is None else wanted)
        missing = [name for name in names if name not in members]
        if missing:
            raise ValueError(f"array {missing[0]!r} is missing; it holds {', '.join(members):.200}")
        total_bytes = sum(members[name].file_size for name in names)
        if limit_bytes is not None and total_bytes > limit_bytes:
            raise ValueError(f"its arrays take {total_bytes} bytes, expected at most {limit_bytes}")
        arrays = {}
        for name in names:
            with archive.open(members[name]) as file:
                try:
                    arrays[name] = _read_array(
                        file, members[name].file_size, wanted[name] if wanted else None
                    )
                except ValueError as error:
                    raise ValueError(f"array {name!r:.200}: {error}") from error
        return arrays


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        reason = (
            (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        )
        raise InputError(f"{path}: cannot be read: {' '.join(reason.split()):.400}") from error


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if not info.filename.endswith(_SUFFIX):
            raise ValueError(f"it holds {info.filename!r:.100}, expected arrays (.npy) only")
        name = info.filename.removesuffix(_SUFFIX)
        if name in members:
            raise ValueError(f"it holds array {name!r:.100} twice")
        members[name] = info
    return members


def _read_array(file: IO[bytes], size_bytes: int, wanted: ArraySpec | None) -> NDArray[np.generic]:
    """Read one .npy of `size_bytes` bytes; ValueError says what is wrong with it."""
    version = np.lib.format.read_magic(file)
    if version not in _READ_HEADER:
        raise ValueError(f"version {version} of the .npy format, expected 1.0 or 2.0")
    shape, is_fortran, dtype = _READ_HEADER[version](file)
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects, expected plain numbers")
    if dtype.names is not None or dtype.subdtype is not None or dtype.itemsize == 0:
        raise ValueError(f"dtype {dtype!s:.80}, expected plain numbers")
    if wanted is not None:
        _check_wanted(shape, dtype, wanted)
    data_bytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or file.tell() + data_bytes != size_bytes:
        raise ValueError(f"{size_bytes} bytes do not fit an array of shape {shape!s:.80} and dtype {dtype}")
    data = file.read(data_bytes + 1)  # one more, so that an archive reaches the end and compares its checksum
    if len(data) != data_bytes:
        raise ValueError(f"{len(data)} bytes of data, expected {data_bytes}")
    return np.ndarray(shape, dtype, buffer=data, order="F" if is_fortran else "C")


def _check_wanted(shape: tuple[int, ...], dtype: np.dtype[np.generic], wanted: ArraySpec) -> None:
    fits = len(shape) == len(wanted.shape) and all(
        expected is None or axis == expected for axis, expected in zip(shape, wanted.shape, strict=True)
    )
    if not fits or dtype != np.dtype(wanted.dtype):
        expected = f"({', '.join('any' if axis is None else str(axis) for axis in wanted.shape)})"
        raise ValueError(f"{dtype} {shape!s:.80}, expected {wanted.dtype} {expected}")

"""The shared libraries that a Linux library is linked against, read from its ELF dynamic section.

ELF: System V ABI, chapters 4 and 5. Only 64-bit little-endian files are read, which is what ONNX Runtime ships.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

__all__ = ["needed_libraries"]

_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_SEGMENT_LOAD, _SEGMENT_DYNAMIC = 1, 2
_TAG_NEEDED, _TAG_STRING_TABLE = 1, 5


def needed_libraries(path: Path) -> tuple[str, ...]:
    """The names that the loader must find before it can load `path`, in the file's order.

    Returns:
        For example `("libcublas.so.13", "libc.so.6")`; nothing for a file that is missing or no such library.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_needed(data)
    except (OSError, ValueError, struct.error):
        return ()


def _read_needed(data: mmap.mmap) -> tuple[str, ...]:
    if data[: len(_MAGIC)] != _MAGIC:
        return ()
    (table_at,) = struct.unpack_from("<Q", data, 32)
    entry_bytes, entries = struct.unpack_from("<HH", data, 54)
    segments = [
        struct.unpack_from("<IIQQQQ", data, table_at + number * entry_bytes) for number in range(entries)
    ]
    tags: list[tuple[int, int]] = []
    for kind, _, offset, _, _, size_bytes in segments:
        if kind == _SEGMENT_DYNAMIC:
            tags += struct.iter_unpack("<QQ", data[offset : offset + size_bytes - size_bytes % 16])
    table = next((value for tag, value in tags if tag == _TAG_STRING_TABLE), None)
    if table is None:
        return ()
    for kind, _, offset, address, _, size_bytes in segments:
        if kind == _SEGMENT_LOAD and address <= table < address + size_bytes:
            strings_at = offset + table - address
            return tuple(_string(data, strings_at + value) for tag, value in tags if tag == _TAG_NEEDED)
    return ()


def _string(data: mmap.mmap, start: int) -> str:
    return data[start : data.find(b"\0", start)].decode("ascii", "replace")

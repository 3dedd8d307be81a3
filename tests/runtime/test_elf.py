from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from te_runtime.elf import needed_libraries


def library(names: tuple[str, ...]) -> bytes:
    """A 64-bit ELF file of a header, one load and one dynamic segment, and their strings."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    offsets, at = [], 1
    for name in names:
        offsets.append(at)
        at += len(name) + 1
    headers_at, dynamic_at = 64, 64 + 2 * 56
    tags = [(1, offset) for offset in offsets]
    strings_at = dynamic_at + 16 * (len(tags) + 2)
    address = 0x1000  # where the file is mapped
    tags += [(5, address + strings_at), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in tags)
    size = strings_at + len(strings)
    header = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, headers_at, 0, 0, 64, 56, 2, 0, 0, 0)
    )
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, address, address, size, size, 4096)
    segment = struct.pack(
        "<IIQQQQQQ", 2, 6, dynamic_at, address + dynamic_at, 0, len(dynamic), len(dynamic), 8
    )
    return header + load + segment + dynamic + strings


def test_the_names_come_in_the_files_order(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(library(("libcublas.so.13", "libc.so.6")))
    assert needed_libraries(path) == ("libcublas.so.13", "libc.so.6")


@pytest.mark.parametrize(
    "data", [b"", b"text", b"\x7fELF\x01\x01" + bytes(80), library(("a",))[:70], library(("a",))[:130]]
)
def test_what_is_no_such_library_gives_nothing(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(data)
    assert needed_libraries(path) == ()
    assert needed_libraries(tmp_path / "missing.so") == ()


@pytest.mark.skipif(sys.platform != "linux", reason="ELF is the format of Linux")
def test_a_real_library() -> None:
    import onnxruntime

    (path,) = (Path(onnxruntime.__file__).parent / "capi").glob("onnxruntime_pybind11_state*.so")
    assert "libc.so.6" in needed_libraries(path)

"""The instructions of a pickle, read with bounds and without acting on them.

`pickletools` supplies the table of opcodes and the kind of argument of each; the arguments are read here, so
that every length is checked against the bytes that are there before anything of that length is made.
"""

from __future__ import annotations

import mmap
import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from te_export.errors import CheckpointError

__all__ = ["MAX_INSTRUCTIONS", "MAX_PICKLE_BYTES", "Argument", "instructions"]

Argument = None | int | float | str | bytes | bytearray | tuple[str, str]

MAX_PICKLE_BYTES: Final = 1 << 28
MAX_INSTRUCTIONS: Final = 5_000_000
_MAX_LINE_BYTES: Final = 1 << 16
_MAX_INTEGER_BYTES: Final = 1024


class _Cursor:
    """A position in the bytes of one pickle."""

    def __init__(self, data: bytes | mmap.mmap, start: int) -> None:
        self.data = data
        self.position = start
        self.end = min(len(data), start + MAX_PICKLE_BYTES)

    def take(self, size_bytes: int) -> bytes:
        if size_bytes > self.end - self.position:
            raise CheckpointError(
                f"pickle byte {self.position} begins a value of {size_bytes} bytes, found "
                f"{self.end - self.position}; the file is damaged"
            )
        self.position += size_bytes
        return self.data[self.position - size_bytes : self.position]

    def line(self) -> bytes:
        stop = self.data.find(b"\n", self.position, min(self.end, self.position + _MAX_LINE_BYTES))
        if stop < 0:
            raise CheckpointError(f"pickle byte {self.position} begins a line that does not end")
        return self.take(stop + 1 - self.position)[:-1]

    def unsigned(self, size_bytes: int) -> int:
        return int.from_bytes(self.take(size_bytes), "little")

    def counted(self, length_bytes: int) -> bytes:
        return self.take(self.unsigned(length_bytes))


def _integer(cursor: _Cursor, length_bytes: int) -> int:
    size_bytes = cursor.unsigned(length_bytes)
    if size_bytes > _MAX_INTEGER_BYTES:
        raise CheckpointError(
            f"pickle byte {cursor.position}: an integer of {size_bytes} bytes, expected at most 1024"
        )
    return int.from_bytes(cursor.take(size_bytes), "little", signed=True)


def _decimal(cursor: _Cursor) -> int | bool:
    line = cursor.line()
    if line in (b"00", b"01"):  # protocol 0 writes booleans as integers with a leading zero
        return line == b"01"
    return int(line.removesuffix(b"L"))


def _quoted(cursor: _Cursor) -> str:
    line = cursor.line()
    if len(line) < 2 or line[:1] not in b"'\"" or line[:1] != line[-1:]:
        raise CheckpointError(f"pickle byte {cursor.position}: a string without quotes")
    return line[1:-1].decode(
        "latin-1"
    )  # as Python 2 wrote it; escapes are left, nothing here depends on them


def _two_lines(cursor: _Cursor) -> tuple[str, str]:
    return cursor.line().decode("utf-8"), cursor.line().decode("utf-8")


_READERS: Mapping[str, Callable[[_Cursor], Argument]] = {
    "uint1": lambda cursor: cursor.unsigned(1),
    "uint2": lambda cursor: cursor.unsigned(2),
    "uint4": lambda cursor: cursor.unsigned(4),
    "uint8": lambda cursor: cursor.unsigned(8),
    "int4": lambda cursor: int.from_bytes(cursor.take(4), "little", signed=True),
    "float8": lambda cursor: float(struct.unpack(">d", cursor.take(8))[0]),
    "long1": lambda cursor: _integer(cursor, 1),
    "long4": lambda cursor: _integer(cursor, 4),
    "decimalnl_short": _decimal,
    "decimalnl_long": _decimal,
    "floatnl": lambda cursor: float(cursor.line()),
    "stringnl": _quoted,
    "stringnl_noescape": lambda cursor: cursor.line().decode("utf-8"),
    "stringnl_noescape_pair": _two_lines,
    "unicodestringnl": lambda cursor: cursor.line().decode("raw-unicode-escape"),
    "string1": lambda cursor: cursor.counted(1).decode("latin-1"),
    "string4": lambda cursor: cursor.counted(4).decode("latin-1"),
    "unicodestring1": lambda cursor: cursor.counted(1).decode("utf-8", "surrogatepass"),
    "unicodestring4": lambda cursor: cursor.counted(4).decode("utf-8", "surrogatepass"),
    "unicodestring8": lambda cursor: cursor.counted(8).decode("utf-8", "surrogatepass"),
    "bytes1": lambda cursor: cursor.counted(1),
    "bytes4": lambda cursor: cursor.counted(4),
    "bytes8": lambda cursor: cursor.counted(8),
    "bytearray8": lambda cursor: bytearray(cursor.counted(8)),
}
_OPCODES: Mapping[int, tuple[str, Callable[[_Cursor], Argument] | None]] = {
    ord(opcode.code): (opcode.name, _READERS[opcode.arg.name] if opcode.arg else None)
    for opcode in pickletools.opcodes
}


def instructions(data: bytes | mmap.mmap, start: int) -> Iterator[tuple[str, Argument, int]]:
    """Yield the instructions of the pickle that begins at `start`, the last one being STOP.

    Args:
        data: bytes that hold a pickle; others may follow it.
        start: position of its first byte.

    Yields:
        opcode name as pickletools spells it, its argument, and the position of the byte after both.

    Raises:
        CheckpointError: an unknown opcode, a malformed or overlong argument, no STOP, too many instructions.
    """
    cursor = _Cursor(data, start)
    for _ in range(MAX_INSTRUCTIONS):
        at = cursor.position
        opcode = _OPCODES.get(cursor.take(1)[0])
        if opcode is None:
            raise CheckpointError(f"pickle byte {at} is {data[at]:#04x}, which is no pickle instruction")
        name, read = opcode
        try:
            argument = read(cursor) if read else None
        except ValueError as error:  # text that is no number, or no UTF-8
            raise CheckpointError(
                f"pickle byte {at}: malformed argument of {name}: {error!s:.120}"
            ) from error
        yield name, argument, cursor.position
        if name == "STOP":
            return
    raise CheckpointError(
        f"the pickle has more than {MAX_INSTRUCTIONS} instructions, expected fewer in a checkpoint"
    )

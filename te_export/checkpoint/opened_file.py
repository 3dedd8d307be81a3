"""The checkpoint file, opened once: everything that is read, hashed or mapped comes from the same file."""

from __future__ import annotations

import difflib
import hashlib
import io
import mmap
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from te_export.errors import CheckpointError

__all__ = ["OpenedFile", "open_file"]

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class OpenedFile:
    """One open regular file.

    Attributes:
        path: as it was given; used in messages and for libraries that open files themselves.
        size_bytes: length when it was opened, at least 1.
        stream: the open file, for readers that seek.
        mapped: the whole file, private and copy-on-write; it outlives `stream` as long as a tensor uses it.
    """

    path: Path
    size_bytes: int
    stream: io.BufferedReader
    mapped: mmap.mmap

    def chunks(self, offset: int, size_bytes: int) -> Iterator[memoryview]:
        """Yield bytes [offset, offset + size_bytes) piece by piece, in one reused buffer.

        Raises:
            CheckpointError: the file became shorter while it was read.
        """
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(size_bytes, 1))))
        end = offset + size_bytes
        while offset < end:
            self.stream.seek(offset)
            piece = buffer[: self.stream.readinto(buffer[: min(len(buffer), end - offset)])]
            if not piece:
                raise CheckpointError(
                    f"ended at byte {offset}, expected {end} bytes: it changed while it was read"
                )
            yield piece
            offset += len(piece)

    def sha256(self) -> str:
        """Hexadecimal digest of the whole file."""
        digest = hashlib.sha256()
        for piece in self.chunks(0, self.size_bytes):
            digest.update(piece)
        return digest.hexdigest()

    def byte_tensor(self, offset: int, size_bytes: int, *, alignment_bytes: int) -> torch.Tensor:
        """Bytes [offset, offset + size_bytes) as uint8 (size_bytes,), mapped where the alignment allows.

        Args:
            alignment_bytes: what the address must be a multiple of; bytes that lie otherwise are copied.
        """
        if size_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        if offset % alignment_bytes == 0:
            return torch.frombuffer(self.mapped, dtype=torch.uint8, count=size_bytes, offset=offset)
        return torch.frombuffer(bytearray(self.mapped[offset : offset + size_bytes]), dtype=torch.uint8)


@contextmanager
def open_file(path: Path) -> Iterator[OpenedFile]:
    """Open a regular file for reading and map it.

    Raises:
        CheckpointError: there is no such file, it is a folder, a device or a pipe, unreadable, or empty.
    """
    _require_regular_file(path)
    try:
        stream = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"cannot be opened: {error.strerror}; check its permissions") from error
    with stream:
        size_bytes = stream.seek(0, 2)
        if size_bytes == 0:
            raise CheckpointError(
                "is empty (0 bytes), expected a checkpoint; was it copied or downloaded completely?"
            )
        try:
            mapped = mmap.mmap(stream.fileno(), size_bytes, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot be mapped into memory: {error}") from error
        yield OpenedFile(path, size_bytes, stream, mapped)


def _require_regular_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise CheckpointError(f"no such file{_nearby(path)}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise CheckpointError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"is a folder, expected a file{_checkpoints_in(path)}")
    if not stat.S_ISREG(mode):
        raise CheckpointError(
            "is a device, pipe or socket, expected a regular file; copy its content to one first"
        )


def _nearby(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"; the folder {path.parent} cannot be listed either"
    close = difflib.get_close_matches(path.name, names, n=3)
    return f"; the folder holds {', '.join(close)}" if close else ""


def _checkpoints_in(folder: Path) -> str:
    try:
        names = sorted(
            entry.name for entry in folder.iterdir() if entry.suffix in {".pt", ".pth", ".safetensors"}
        )
    except OSError:
        return ""
    return f"; it holds {', '.join(names[:3])}" if names else "; it holds no .pt, .pth or .safetensors file"

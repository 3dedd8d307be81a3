"""The files of a bundle: opened without following links, sizes and checksums compared with the manifest's.

Paths are plain strings here, since every start goes through each file and pathlib takes twice as long.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from te_runtime.errors import BundleError
from te_runtime.manifest import FileEntry

__all__ = [
    "ADVICE",
    "BackgroundSums",
    "check_sha256",
    "check_size",
    "chunks",
    "file_path",
    "open_regular",
    "reason",
]

ADVICE = "Copy the bundle again whole, or export the model again."
_CHUNK_BYTES = 2**20
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def check_size(root: str, entry: FileEntry) -> None:
    """Compare a file's size with the manifest's.

    Raises:
        BundleError: the file is missing, no regular file, or of another size.
    """
    with open_regular(root, entry.path) as (_, size_bytes):
        if size_bytes != entry.size_bytes:
            raise BundleError(
                f"{file_path(root, entry.path)}: {size_bytes} bytes, expected {entry.size_bytes}. {ADVICE}"
            )


def check_sha256(root: str, entry: FileEntry) -> None:
    """Compare a file's sha256 with the manifest's.

    Raises:
        BundleError: the file is missing, no regular file, or another one.
    """
    digest = hashlib.sha256()
    with open_regular(root, entry.path) as (descriptor, _):
        for chunk in chunks(descriptor, entry.size_bytes + 1):
            digest.update(chunk)
    found = digest.hexdigest()
    if found != entry.sha256:
        raise BundleError(
            f"{file_path(root, entry.path)}: sha256 {found}, expected {entry.sha256}: the file was changed. {ADVICE}"
        )


class BackgroundSums:
    """Checksums of large files, compared on a thread of their own while the caller loads graphs."""

    def __init__(self, root: str, entries: Sequence[FileEntry]) -> None:
        """Take note; start() begins.

        Args:
            root: the bundle's folder.
            entries: the files.
        """
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._compare, args=(root, tuple(entries)), daemon=True)

    def start(self) -> None:
        """Begin to compare."""
        self._thread.start()

    def finish(self) -> None:
        """Wait for the end.

        Raises:
            BundleError: as check_sha256, of the first file that is wrong.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _compare(self, root: str, entries: Sequence[FileEntry]) -> None:
        try:
            for entry in entries:
                check_sha256(root, entry)
        except BaseException as error:  # noqa: BLE001 - finish() raises it where somebody hears
            self._error = error


@contextmanager
def open_regular(root: str, relative: str) -> Iterator[tuple[int, int]]:
    """Open a file below `root` for reading, following no symlink on the way.

    Args:
        root: the bundle's folder.
        relative: the file's path in it, parts divided by `/`.

    Yields:
        The file descriptor, and the file's size in bytes.

    Raises:
        BundleError: it is missing, no regular file, or cannot be opened or read.
    """
    path = file_path(root, relative)
    try:
        _check_kinds(root, relative)
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError as error:
        raise BundleError(f"{path}: no such file. {ADVICE}") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be opened: {reason(error)}") from error
    try:
        yield descriptor, os.fstat(descriptor).st_size
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {reason(error)}") from error
    finally:
        os.close(descriptor)


def chunks(descriptor: int, limit_bytes: int) -> Iterator[bytes]:
    """What a file holds, piece by piece, and at most `limit_bytes` of it."""
    left = limit_bytes
    while left > 0:
        chunk = os.read(descriptor, min(_CHUNK_BYTES, left))
        if not chunk:
            return
        left -= len(chunk)
        yield chunk


def reason(error: OSError | ValueError) -> str:
    """Why a file cannot be used, in the system's words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def file_path(root: str, relative: str) -> str:
    """Where a file of the bundle is; `relative` has its parts divided by `/`."""
    return os.path.join(root, *relative.split("/"))


def _check_kinds(root: str, relative: str) -> None:
    parts = relative.split("/")
    for number in range(1, len(parts) + 1):
        path = os.path.join(root, *parts[:number])
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            raise BundleError(f"{path}: is a symlink, expected a file of its own. {ADVICE}")
        is_right = stat.S_ISREG(mode) if number == len(parts) else stat.S_ISDIR(mode)
        if not is_right:
            expected = "file" if number == len(parts) else "folder"
            raise BundleError(f"{path}: is not a {expected}. {ADVICE}")

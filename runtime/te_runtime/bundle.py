"""Opens a bundle folder: the manifest parsed, every file it lists there, whole and unchanged.

Checks run in one order and stop at the first finding: the folder, manifest.json, its content, then for every
listed file existence and size, and last the checksums. Files that the manifest does not list are ignored.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from te_runtime.errors import BundleError, InputError
from te_runtime.interfaces import check_interfaces
from te_runtime.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, Manifest, parse_manifest

__all__ = ["Bundle", "Check", "open_bundle"]

Check = Literal["full", "size"]

_CHUNK_BYTES = 2**20
_ADVICE = "Copy the bundle again whole, or export the model again."


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        root: the bundle's folder, absolute.
        manifest: what the bundle holds.
        manifest_sha256: checksum of manifest.json itself, which nothing in the bundle holds: compare it with
            the sender's.
        check: `full` if every checksum was compared, `size` if only sizes were.
        folder_id: device and inode of the folder that was checked.
    """

    root: Path
    manifest: Manifest
    manifest_sha256: str
    check: Check
    folder_id: tuple[int, int]

    def path(self, relative: str) -> Path:
        """The absolute path of a file that the manifest names."""
        return self.root.joinpath(*relative.split("/"))

    def require_same_folder(self) -> None:
        """Refuse a bundle that was replaced by another one while it was being loaded.

        Raises:
            BundleError: `root` names another folder than the one that was checked.
        """
        if _folder_id(self.root) != self.folder_id:
            raise BundleError(f"{self.root}: was replaced while it was being loaded. Load it again.")


def open_bundle(path: str | os.PathLike[str], *, check: Check = "full") -> Bundle:
    """Open the bundle in folder `path`.

    Args:
        path: the folder that te-export wrote.
        check: `full` compares the size and the sha256 of every listed file; `size` leaves out the sha256,
            which is faster and misses changed bytes.

    Raises:
        BundleError: no bundle there, or it is damaged, incomplete or of another version.
        InputError: `check` is neither of the two.
    """
    if check not in ("full", "size"):
        raise InputError(f"check: found {check!r}, expected 'full' or 'size'")
    root = _find_root(Path(path))
    folder_id = _folder_id(root)
    where = str(root / MANIFEST_NAME)
    data = _read_manifest(root)
    manifest = parse_manifest(data, where)
    check_interfaces(manifest, where)
    for entry in manifest.files:
        _check_size(root, entry)
    if check == "full":
        for entry in manifest.files:
            _check_sha256(root, entry)
    return Bundle(root, manifest, hashlib.sha256(data).hexdigest(), check, folder_id)


def _folder_id(root: Path) -> tuple[int, int]:
    try:
        status = root.stat()
    except OSError as error:
        raise BundleError(f"{root}: cannot be opened: {_reason(error)}") from error
    return status.st_dev, status.st_ino


def _find_root(path: Path) -> Path:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BundleError(
            f"{str(path)!r}: is not valid text, and onnxruntime opens no other paths. Rename the folder."
        ) from error
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise BundleError(f"{path}: no such folder. Pass the folder that te-export wrote.") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be opened: {_reason(error)}") from error
    if not stat.S_ISDIR(mode):
        raise BundleError(f"{path}: is a file, expected a bundle: pass the folder that te-export wrote.")
    return path.resolve()


def _read_manifest(root: Path) -> bytes:
    where = root / MANIFEST_NAME
    with _open_regular(root, MANIFEST_NAME) as (descriptor, size_bytes):
        if size_bytes > MAX_MANIFEST_BYTES:
            raise BundleError(
                f"{where}: {size_bytes} bytes, expected at most {MAX_MANIFEST_BYTES}. {_ADVICE}"
            )
        return b"".join(_chunks(descriptor, MAX_MANIFEST_BYTES + 1))


def _check_size(root: Path, entry: FileEntry) -> None:
    with _open_regular(root, entry.path) as (_, size_bytes):
        if size_bytes != entry.size_bytes:
            raise BundleError(
                f"{root / entry.path}: {size_bytes} bytes, expected {entry.size_bytes}. {_ADVICE}"
            )


def _check_sha256(root: Path, entry: FileEntry) -> None:
    digest = hashlib.sha256()
    with _open_regular(root, entry.path) as (descriptor, _):
        for chunk in _chunks(descriptor, entry.size_bytes + 1):
            digest.update(chunk)
    found = digest.hexdigest()
    if found != entry.sha256:
        raise BundleError(
            f"{root / entry.path}: sha256 {found}, expected {entry.sha256}: the file was changed. {_ADVICE}"
        )


@contextmanager
def _open_regular(root: Path, relative: str) -> Iterator[tuple[int, int]]:
    """Open a file below `root` for reading, following no symlink on the way.

    Yields:
        The file descriptor, and the file's size in bytes.
    """
    path = root / relative
    try:
        _check_kinds(root, relative)
        flags = (
            os.O_RDONLY
            | getattr(os, "O_BINARY", 0)
            | getattr(os, "O_NOFOLLOW", 0)
            | getattr(os, "O_CLOEXEC", 0)
        )
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise BundleError(f"{path}: no such file. {_ADVICE}") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be opened: {_reason(error)}") from error
    try:
        yield descriptor, os.fstat(descriptor).st_size
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {_reason(error)}") from error
    finally:
        os.close(descriptor)


def _check_kinds(root: Path, relative: str) -> None:
    path = root
    parts = relative.split("/")
    for number, part in enumerate(parts, start=1):
        path = path / part
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise BundleError(f"{path}: is a symlink, expected a file of its own. {_ADVICE}")
        is_right = stat.S_ISREG(mode) if number == len(parts) else stat.S_ISDIR(mode)
        if not is_right:
            expected = "file" if number == len(parts) else "folder"
            raise BundleError(f"{path}: is not a {expected}. {_ADVICE}")


def _chunks(descriptor: int, limit_bytes: int) -> Iterator[bytes]:
    left = limit_bytes
    while left > 0:
        chunk = os.read(descriptor, min(_CHUNK_BYTES, left))
        if not chunk:
            return
        left -= len(chunk)
        yield chunk


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)

"""A bundle appears whole or not at all.

Everything is written into a hidden sibling of the target, flushed to disk, and moved into place by one
rename. Replacing an existing bundle exchanges the two folders in one system call where the platform has
one; elsewhere it takes two renames with signals held back. Whatever stops the export before that leaves the
target as it was.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from te_export.bundle.exchange import exchange_folders
from te_export.errors import OutputError
from te_runtime.errors import BundleError, TeRuntimeError
from te_runtime.manifest import (
    FORMAT_NAME,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    FileEntry,
    parse_manifest,
    seal_manifest,
)

__all__ = ["StagedBundle", "check_target", "leftovers"]

_SCRATCH = "scratch"


def check_target(target: Path, *, force: bool) -> None:
    """Refuse, before any work is done, a target that could not be written in the end.

    Raises:
        OutputError: it exists (without `force`), is not a bundle that `force` may replace, or its parent is
            not a writable folder.
    """
    try:
        str(target).encode("utf-8")
    except UnicodeEncodeError as error:
        raise OutputError(
            f"{str(target)!r}: onnxruntime opens only paths that are valid text. Choose another with -o DIR."
        ) from error
    parent = target.parent
    if not parent.is_dir():
        raise OutputError(
            f"{parent}: no such folder to write {target.name!r} into. Create it, or choose another with -o "
            "DIR."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent}: not writable. Choose another folder with -o DIR.")
    if not os.path.lexists(target):
        return
    if target.is_symlink():
        raise OutputError(
            f"{target}: is a symbolic link. Name the folder it points to, or another with -o DIR."
        )
    if not target.is_dir():
        raise OutputError(f"{target}: exists and is not a folder. Choose another with -o DIR.")
    if not force:
        raise OutputError(
            f"{target}: exists already. Replace it with --force, or choose another folder with -o DIR."
        )
    _check_replaceable(target)


def leftovers(target: Path) -> list[Path]:
    """Hidden siblings that an export which was killed outright left beside the target."""
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.te-export-*"))


def _check_replaceable(target: Path) -> None:
    """--force replaces bundles, not whatever folder was named by mistake, and never a file that no export
    wrote.
    """
    try:
        if not any(target.iterdir()):
            return
        data = (target / MANIFEST_NAME).read_bytes()
        listed = _listed_files(data, str(target / MANIFEST_NAME))
        present = {
            str(path.relative_to(target))
            for path in target.rglob("*")
            if path.is_symlink() or not path.is_dir()
        }
    except (OSError, TeRuntimeError) as error:
        raise OutputError(
            f"{target}: holds files but is not a te-export bundle, so --force does not replace it ({error}). "
            "Choose another folder with -o DIR, or remove it yourself."
        ) from error
    foreign = sorted(present - listed - {MANIFEST_NAME})
    if foreign:
        raise OutputError(
            f"{target}: holds {len(foreign)} files that are not the bundle's ({', '.join(foreign[:5])}), "
            "which --force would lose. "
            "Move them elsewhere, or choose another folder with -o DIR."
        )


def _listed_files(data: bytes, where: str) -> set[str]:
    """The files that a manifest lists.

    Raises:
        BundleError: it is neither one of this version nor a whole one of another.
    """
    try:
        return {entry.path for entry in parse_manifest(data, where).files}
    except BundleError:
        listed = _files_of_another_version(data)
        if listed is None:
            raise
        return listed


def _files_of_another_version(data: bytes) -> set[str] | None:
    """The same of a manifest that another version of te-export wrote, with keys of its own; None where none did.

    What tells is the checksum that every version puts there.
    """
    if not 0 < len(data) <= MAX_MANIFEST_BYTES or seal_manifest(data) != data:
        return None
    try:
        manifest = json.loads(data)
        return (
            {str(entry["path"]) for entry in manifest["files"]} if manifest["format"] == FORMAT_NAME else None
        )
    except (ValueError, RecursionError, KeyError, TypeError):
        return None


class StagedBundle:
    """A bundle being written. Use as a context manager; what is not published by its end is removed.

    Attributes:
        root: the hidden folder that holds the files until `publish`.
    """

    def __init__(self, target: Path, *, force: bool) -> None:
        self._target = target
        self._force = force
        self._files: dict[str, FileEntry] = {}
        self._published = False
        with _plain_errors(target):
            self.root = target.parent / f".{target.name}.te-export-{secrets.token_hex(6)}"
            self.root.mkdir()

    def __enter__(self) -> StagedBundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._published:
            with _signals_held():
                shutil.rmtree(self.root, ignore_errors=True)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file written so far, by path."""
        return tuple(self._files[path] for path in sorted(self._files))

    def size_bytes(self, path: str) -> int:
        """Size of a file that was written."""
        return self._files[path].size_bytes

    def write(self, path: str, chunks: Iterable[bytes | memoryview]) -> FileEntry:
        """Write one file of the bundle, flushed to disk, and remember its size and sha256.

        Args:
            path: relative to the bundle, with `/`.
            chunks: the contents in order.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
        """
        target = self.root / path
        digest, size = hashlib.sha256(), 0
        with _plain_errors(self._target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    size += file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        entry = FileEntry(path=path, size_bytes=size, sha256=digest.hexdigest())
        self._files[path] = entry
        return entry

    def discard(self, folder: str) -> None:
        """Remove a folder of the bundle that was written and is not wanted after all."""
        with _plain_errors(self._target):
            if (self.root / folder).exists():
                shutil.rmtree(self.root / folder)
        self._files = {
            path: entry for path, entry in self._files.items() if not path.startswith(f"{folder}/")
        }

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder beside the bundle's files, gone afterwards, for graphs that are only tried.

        Raises:
            OutputError: the disk is full.
        """
        folder = self.root / _SCRATCH
        with _plain_errors(self._target):
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def check_room(self, size_bytes: int) -> None:
        """Refuse early where the disk has less room than the weights need.

        Raises:
            OutputError: with both figures.
        """
        free = shutil.disk_usage(self.root).free
        if free < size_bytes:
            raise OutputError(
                f"{self._target.parent}: no space for the bundle: it needs {size_bytes / 1e6:.1f} MB, "
                f"{free / 1e6:.1f} MB are free. "
                "Free some, or choose a folder on another disk with -o DIR."
            )

    def publish(self) -> None:
        """Move the bundle to its target in one step.

        Raises:
            OutputError: something appeared at the target meanwhile, or the move failed; the target is as it
                was.
        """
        with _plain_errors(self._target), _signals_held():
            _sync_folders(self.root)
            if os.path.lexists(self._target):
                check_target(self._target, force=self._force)
                exchange_folders(self.root, self._target)
                shutil.rmtree(self.root, ignore_errors=True)
            else:
                self.root.rename(self._target)
            self._published = True
        with contextlib.suppress(
            OSError
        ):  # some network file systems refuse it; the bundle is there all the same
            _sync_folder(self._target.parent)


@contextmanager
def _plain_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "Free some space" if full else "Check the folder and its permissions"
        raise OutputError(
            f"{target}: cannot be written: {error.strerror or error}. {advice}, or choose another folder "
            "with -o DIR. Nothing was left behind."
        ) from error


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let no interrupt fall into the body; what came meanwhile is raised after it.

    Python runs signal handlers in the main thread only, so there is nothing to hold elsewhere.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    held = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, lambda caught, _: came.append(caught)) for number in held}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    for number in came[:1]:
        signal.raise_signal(number)


def _sync_folders(root: Path) -> None:
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

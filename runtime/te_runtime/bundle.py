"""Opens a bundle folder: the manifest parsed, every file it lists there, whole and unchanged.

Checks run in one order and stop at the first finding: the folder, manifest.json, its content, then for every
listed file existence and size, and last the checksums. Files that the manifest does not list are ignored.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from te_runtime.bundle_files import (
    ADVICE,
    BackgroundSums,
    check_sha256,
    check_size,
    chunks,
    file_path,
    open_regular,
    reason,
)
from te_runtime.choices import parse_choice
from te_runtime.errors import BundleError, InputError
from te_runtime.interfaces import check_interfaces
from te_runtime.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, Manifest, parse_manifest

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Bundle", "Check", "open_bundle"]

Check = Literal["full", "size"]

_LARGE_BYTES = 2**20
_GRAPH_SUFFIX = ".onnx"
_PASS_FOLDER = "Pass the folder that te-export wrote."


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        folder: the bundle's folder, absolute.
        manifest: what the bundle holds.
        manifest_sha256: checksum of manifest.json itself, to compare with
            the sender's.
        check: `full` if every checksum was compared, `size` if only sizes were.
        folder_id: device and inode of the folder that was checked.
        pending: checksums that start_check begins to compare; None where there are none.
    """

    folder: str
    manifest: Manifest
    manifest_sha256: str
    check: Check
    folder_id: tuple[int, int]
    pending: BackgroundSums | None = None

    @property
    def root(self) -> Path:
        """The bundle's folder, absolute."""
        from pathlib import Path  # here, because predict never needs it and it takes 5 ms of every start

        return Path(self.folder)

    def path(self, relative: str) -> str:
        """The absolute path of a file that the manifest names."""
        return file_path(self.folder, relative)

    def start_check(self) -> None:
        """Begin to compare the checksums that wait."""
        if self.pending is not None:
            self.pending.start()

    def finish_check(self) -> None:
        """Wait for checksums that are being compared.

        Raises:
            BundleError: a file is not what the manifest says.
        """
        if self.pending is not None:
            self.pending.finish()

    def require_same_folder(self) -> None:
        """Refuse a bundle that was replaced by another one since it was opened.

        Raises:
            BundleError: `root` names another folder than the one that was checked.
        """
        if _folder_id(self.folder) != self.folder_id:
            raise BundleError(f"{self.folder}: was replaced since it was opened. Load it again.")

    def require_unchanged(self) -> None:
        """Refuse a bundle whose files are no longer those that were opened.

        Raises:
            BundleError: the folder was replaced, or a file changed.
        """
        self.require_same_folder()
        again = open_bundle(self.folder, check=self.check)
        if again.manifest_sha256 != self.manifest_sha256:
            raise BundleError(f"{self.folder}: another bundle was written there since. Load it again.")


def open_bundle(path: str | os.PathLike[str], *, check: Check = "full", wait: bool = True) -> Bundle:
    """Open the bundle in folder `path`.

    Args:
        path: the folder that te-export wrote.
        check: `full` compares the size and the sha256 of every listed file; `size` leaves out the sha256,
            which is faster and misses changed bytes.
        wait: False leaves the checksums of weights and golden rows to start_check() and finish_check(), for
            callers that load the graphs meanwhile. Graphs, which onnxruntime parses, are compared here in any
            case.

    Raises:
        BundleError: no bundle there, or it is damaged, incomplete or of another version.
        InputError: `check` is neither of the two.
    """
    parse_choice("check", check, get_args(Check))
    root = _find_root(_parse_path(path))
    folder_id = _folder_id(root)
    where = file_path(root, MANIFEST_NAME)
    data = _read_manifest(root)
    manifest = parse_manifest(data, where)
    check_interfaces(manifest, where)
    for entry in manifest.files:
        check_size(root, entry)
    pending = None
    if check == "full":
        later = [] if wait else [entry for entry in manifest.files if _may_wait(entry)]
        pending = BackgroundSums(root, later) if later else None
        for entry in manifest.files:
            if entry not in later:
                check_sha256(root, entry)
    return Bundle(root, manifest, hashlib.sha256(data).hexdigest(), check, folder_id, pending)


def _parse_path(path: object) -> str:
    if not isinstance(path, str | bytes | os.PathLike):
        raise InputError(f"path: found {path!r:.80}, expected text or a path: the bundle's folder")
    return os.fsdecode(path)


def _may_wait(entry: FileEntry) -> bool:
    return entry.size_bytes >= _LARGE_BYTES and not entry.path.endswith(_GRAPH_SUFFIX)


def _folder_id(root: str) -> tuple[int, int]:
    try:
        status = os.stat(root)
    except OSError as error:
        raise BundleError(f"{root}: cannot be opened: {reason(error)}") from error
    return status.st_dev, status.st_ino


def _find_root(path: str) -> str:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BundleError(
            f"{path!r}: is not valid text, and onnxruntime opens no other paths. Rename the folder."
        ) from error
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        hint = "`~` is not expanded: pass os.path.expanduser(path)." if path.startswith("~") else _PASS_FOLDER
        raise BundleError(f"{path}: no such folder. {hint}") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be opened: {reason(error)}") from error
    if not stat.S_ISDIR(mode):
        raise BundleError(f"{path}: is a file, expected a bundle: pass the folder that te-export wrote.")
    return os.path.realpath(path)


def _read_manifest(root: str) -> bytes:
    if not os.path.lexists(file_path(root, MANIFEST_NAME)):
        raise BundleError(f"{root}: holds no {MANIFEST_NAME}, so it is no bundle. {_PASS_FOLDER}")
    with open_regular(root, MANIFEST_NAME) as (descriptor, size_bytes):
        if size_bytes > MAX_MANIFEST_BYTES:
            raise BundleError(
                f"{root}/{MANIFEST_NAME}: {size_bytes} bytes, expected at most {MAX_MANIFEST_BYTES}. {ADVICE}"
            )
        return b"".join(chunks(descriptor, MAX_MANIFEST_BYTES + 1))

"""Whether files of a bundle are still those that were there when it was loaded.

Checksums are compared once, when a bundle is loaded; a graph that is loaded later reads its file, and its weights,
from the same paths.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from te_runtime.errors import BundleError

if TYPE_CHECKING:
    from te_runtime.bundle import Bundle

__all__ = ["FileMarks"]


class FileMarks:
    """What the file system says of some files, to be compared with what it says later."""

    def __init__(self, bundle: Bundle, paths: Sequence[str]) -> None:
        """Take the marks.

        Args:
            bundle: the bundle.
            paths: of files that it lists.
        """
        self._bundle = bundle
        self._marks = {path: _mark(bundle.path(path)) for path in paths}

    def require_unchanged(self, *paths: str) -> None:
        """Refuse files that were replaced or written to since.

        Raises:
            BundleError: the first of `paths` that is not as it was, or the folder was replaced.
        """
        self._bundle.require_same_folder()
        for path in paths:
            if _mark(self._bundle.path(path)) != self._marks[path]:
                raise BundleError(
                    f"{self._bundle.path(path)}: was changed since the bundle was loaded. Load it again."
                )


def _mark(path: str) -> tuple[int, int, int, int] | None:
    """What changes when a file is replaced or written to; None where there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116 - pathlib takes 5 ms of every start
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

"""A bound on the work of looking through what a pickle describes."""

from __future__ import annotations

from typing import Final

from te_export.errors import CheckpointError

__all__ = ["WorkLimit"]

_MAX_ENTRIES: Final = 2_000_000


class WorkLimit:
    """Counts entries looked at: a small pickle can hold many objects that all refer to the same long list."""

    def __init__(self, max_entries: int = _MAX_ENTRIES) -> None:
        self._left = max_entries

    def spend(self, entries: int) -> None:
        """Count entries about to be looked at.

        Raises:
            CheckpointError: that is more than any checkpoint needs.
        """
        self._left -= entries
        if self._left < 0:
            raise CheckpointError(
                "the pickle's objects refer to each other more often than in any checkpoint; the file is "
                "damaged, or made to take forever"
            )

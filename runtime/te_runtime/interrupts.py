"""Ctrl-C under another name: code that it hits while it imports or makes a class raises something else because of it."""

from __future__ import annotations

__all__ = ["was_interrupted"]


def was_interrupted(error: BaseException | None) -> bool:
    """Whether a KeyboardInterrupt is `error`, or what it was raised from or during."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False

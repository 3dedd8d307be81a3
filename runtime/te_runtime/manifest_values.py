"""Which names and paths manifest.json may hold, and how a value is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable

from te_runtime.strict_json import StrictJsonError

__all__ = ["MAX_PATH_LENGTH", "check_path", "check_unique", "is_task_name", "require"]

MAX_PATH_LENGTH = 240

_TASK_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PATH_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def is_task_name(name: str) -> bool:
    """Whether `name` may name a task: 1 to 64 ASCII letters, digits, `_` or `-`."""
    return _TASK_NAME.fullmatch(name) is not None


def require(holds: bool, message: str) -> None:
    """Refuse a value; the decoder adds its place.

    Raises:
        StrictJsonError: with the message, where `holds` is false.
    """
    if not holds:
        raise StrictJsonError(message)


def check_unique(what: str, names: Iterable[str]) -> None:
    """Refuse names of which two differ by no more than case."""
    seen: set[str] = set()
    for name in names:
        require(name.lower() not in seen, f"{what} {name!r} stands twice (upper and lower case count as one)")
        seen.add(name.lower())


def check_path(path: str) -> None:
    """Refuse a path that leaves the bundle or that some system cannot have."""
    parts = path.split("/")
    require(
        len(path) <= MAX_PATH_LENGTH and all(_PATH_PART.fullmatch(part) for part in parts),
        f"path {path!r:.120} is not allowed: expected a relative path of letters, digits, '_', '-' and '.' "
        "inside the bundle",
    )

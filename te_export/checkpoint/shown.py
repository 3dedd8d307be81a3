"""Values from a file, shown in messages: short, printable, and never by recursion into them."""

from __future__ import annotations

__all__ = ["shown"]

_MAX_CHARACTERS = 60


def shown(value: object) -> str:
    """Text for a scalar, the type's name for anything else; ASCII, at most 60 characters."""
    if isinstance(value, str | bytes | int | float | None):
        text = ascii(value[: _MAX_CHARACTERS + 1] if isinstance(value, str | bytes) else value)
        return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 3]}..."
    return f"a {type(value).__name__}"

"""Arguments out of small closed sets: one of several texts, or a whole number within bounds."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex, TypeVar

from te_runtime.errors import InputError, TeRuntimeError

__all__ = ["parse_choice", "parse_number"]

T = TypeVar("T", bound=str)


def parse_choice(what: str, value: object, known: Sequence[T], error: type[TeRuntimeError] = InputError) -> T:
    """The one of `known` that a caller means.

    Args:
        what: the argument's name.
        value: what was passed.
        known: what may be passed.
        error: what to raise.

    Raises:
        InputError, or `error`: it is none of them.
    """
    if isinstance(value, str):
        for choice in known:
            if value == choice:
                return choice
    *others, last = map(repr, known)
    expected = f"{', '.join(others)} or {last}" if others else last
    raise error(f"{what}: found {value!r:.80}, expected {expected}")


def parse_number(what: str, value: object, lowest: int, highest: int | None = None) -> int:
    """A whole number from `lowest` to `highest`; any integer type will do, and True is none.

    Raises:
        InputError: it is another thing or out of bounds.
    """
    bounds = f"a whole number from {lowest}" + ("" if highest is None else f" to {highest}")
    number = _whole_number(value)
    if number is None or number < lowest or (highest is not None and number > highest):
        raise InputError(f"{what}: found {value!r:.80}, expected {bounds}")
    return number


def _whole_number(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # an array of several numbers has __index__ too
        return None

"""What an inert pickle is made of: names of classes and functions, and objects described but not made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Inert", "Name"]


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names, in the spelling of Python 3."""

    module: str
    qualname: str

    def __str__(self) -> str:
        return f"{self.module}.{self.qualname}"


@dataclass(slots=True, eq=False, repr=False)
class Inert:
    """An object that a pickle describes and that was not made.

    Attributes:
        callee: what would be called to make it; a Name unless the pickle is odd.
        arguments: positional arguments of that call.
        keywords: keyword arguments of that call.
        state: what it would be given as its state; None where it was given none.
        items: what would be appended or added to it.
        pairs: keys and values that would be set in it.
    """

    callee: object
    arguments: tuple[object, ...]
    keywords: Mapping[object, object] = field(default_factory=dict)
    state: object = None
    items: list[object] = field(default_factory=list)
    pairs: list[tuple[object, object]] = field(default_factory=list)

    @property
    def name(self) -> Name | None:
        """The class or function, where it is named directly."""
        return self.callee if isinstance(self.callee, Name) else None

"""A table as the template of report.html draws it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Column", "Meter", "Table", "columns", "make_table"]

ColumnKind = Literal["text", "number", "code"]


@dataclass(frozen=True)
class Column:
    """A heading, and how the cells below it are set."""

    heading: str
    kind: ColumnKind = "text"


@dataclass(frozen=True)
class Meter:
    """A share that is drawn as a line under its number."""

    share: float

    @property
    def width_percent(self) -> int:
        return round(100 * min(max(self.share, 0.0), 1.0))

    def __str__(self) -> str:
        return f"{self.share:.0%}"


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first cell of a row is the row's own heading.

    Attributes:
        caption: what the table shows, for those who hear the page as for those who see it.
        folded: whether it is long, and opened by the reader.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str | Meter, ...], ...]
    folded: bool = False


def columns(*headings: str, numbers: Iterable[str] = (), code: Iterable[str] = ()) -> tuple[Column, ...]:
    """Columns of text, apart from those named as numbers or code."""
    kinds: dict[str, ColumnKind] = {
        **dict.fromkeys(numbers, "number"),
        **dict.fromkeys(code, "code"),
    }
    return tuple(Column(heading, kinds.get(heading, "text")) for heading in headings)


def make_table(
    caption: str,
    headings: Sequence[Column],
    rows: Iterable[Sequence[str | Meter]],
    *,
    open_rows: int | None = None,
) -> Table:
    """A table that is folded where it has more than `open_rows` rows; None keeps it open."""
    kept = tuple(tuple(row) for row in rows)
    return Table(caption, tuple(headings), kept, folded=open_rows is not None and len(kept) > open_rows)

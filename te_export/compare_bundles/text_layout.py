"""How the text of a comparison is laid out: tables without frames, wrapped sentences, names that are safe to print."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

__all__ = ["NOTHING", "escaped", "field", "ratio", "some", "table"]

NOTHING = "-"
_NARROWEST = 40
_LABEL = 11
_SHOWN_NAMES = 12


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, names: int = 1) -> Iterator[str]:
    """Lines of a table as wide as the terminal, 80 columns in a pipe.

    Args:
        headings: of the columns.
        rows: one cell per column.
        names: how many columns at the left hold text; the others hold figures.
    """
    drawn = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    for place, heading in enumerate(headings):
        is_name = place < names
        drawn.add_column(heading, overflow="fold", justify="left" if is_name else "right")
    for row in rows:
        drawn.add_row(*row)
    buffer = io.StringIO()
    Console(file=buffer, width=_width() - 2, no_color=True, highlight=False, markup=False).print(drawn)
    yield from (f"  {line}".rstrip() for line in buffer.getvalue().splitlines())


def field(label: str, text: str) -> Iterator[str]:
    """`  label      text`, wrapped."""
    yield from textwrap.wrap(
        text,
        _width(),
        initial_indent=f"  {label:{_LABEL}} ",
        subsequent_indent=" " * (_LABEL + 3),
        break_on_hyphens=False,
    )


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _SHOWN_NAMES
    shown = ", ".join(names[:_SHOWN_NAMES])
    return f"{shown} and {more} more" if more > 0 else shown


def escaped(text: str) -> str:
    """The text with what a terminal would not show as it is written out."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def ratio(before: float | None, after: float | None) -> str:
    """B over A."""
    return f"{after / before:.2f}x" if before and after is not None else NOTHING


def _width() -> int:
    return max(_NARROWEST, Console().width)

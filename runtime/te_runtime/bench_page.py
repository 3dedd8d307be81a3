"""How the lines of `te-runtime bench` are set: labelled fields and sentences, wrapped to a width, and figures in them."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["WIDTH", "Page", "counted", "page_width", "shown_ms"]

WIDTH = 80
_NARROWEST = 40
_LABEL = 12


@dataclass(frozen=True)
class Page:
    """Text of some width.

    Attributes:
        width: columns, at least 40.
    """

    width: int = WIDTH

    def field(self, label: str, text: str) -> Iterator[str]:
        """A label and what it names, which is indented where it takes several lines."""
        yield from textwrap.wrap(
            text,
            self.width,
            initial_indent=f"{label:{_LABEL}} ",
            subsequent_indent=" " * (_LABEL + 1),
            break_on_hyphens=False,
        )

    def sentence(self, text: str) -> Iterator[str]:
        """Text from the left margin on."""
        yield from textwrap.wrap(text, self.width, break_on_hyphens=False)


def page_width() -> int:
    """The width of the terminal that standard output is, from 40 to 80; 80 where it is none."""
    stream = sys.__stdout__
    if stream is None or stream.closed or not stream.isatty():
        return WIDTH
    return max(_NARROWEST, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 graph`, `3 graphs`; `many` where that is not `one` with an s."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def shown_ms(time_ns: float) -> str:
    """Milliseconds in three digits that count."""
    time_ms = time_ns / 1e6
    if time_ms >= 100:
        return f"{time_ms:,.0f}"
    return f"{time_ms:#.3g}" if time_ms >= 0.001 else f"{time_ms:.6f}"

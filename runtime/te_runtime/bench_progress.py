"""How far a benchmark is: one line on a terminal, written anew; nothing where standard error is no terminal."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from te_runtime.bench_run import Progress

__all__ = ["NoProgress", "TerminalProgress", "choose_progress"]

_WIDEST = 79
_BAR = 20
_ROOM_FOR_BAR = 60  # columns


class NoProgress:
    """Shows nothing."""

    def show(self, what: str, part: float) -> None:
        pass

    def clear(self) -> None:
        pass


class TerminalProgress:
    """One line of a terminal, however narrow. A terminal that is gone is written to no more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream

    def show(self, what: str, part: float) -> None:
        width = self._width()
        done = round(part * _BAR)
        bar = f"[{'#' * done}{'-' * (_BAR - done)}] " if width >= _ROOM_FOR_BAR else ""
        self._write(f"\r{f'{bar}{part:4.0%} {what}'[:width]:{width}}")

    def clear(self) -> None:
        self._write(f"\r{'':{self._width()}}\r")

    def _width(self) -> int:
        """Columns that can be written without beginning another line; the window may have changed since."""
        try:
            columns = 0 if self._stream is None else os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            columns = 0
        return min(_WIDEST, columns - 1) if columns > 1 else _WIDEST

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # the measurement is worth more than the line
            self._stream = None


def choose_progress(stream: TextIO | None = None) -> Progress:
    """A line on `stream`, standard error by itself, if it is a terminal that can go back to a line's beginning."""
    chosen = sys.stderr if stream is None else stream
    if chosen is None or not chosen.isatty() or os.environ.get("TERM") == "dumb":
        return NoProgress()
    return TerminalProgress(chosen)

"""How far a benchmark is: one line on a terminal, written anew; nothing where standard error is no terminal."""

from __future__ import annotations

import sys
from typing import TextIO

from te_runtime.bench_run import Progress

__all__ = ["NoProgress", "TerminalProgress", "choose_progress"]

_WIDTH = 79
_BAR = 20


class NoProgress:
    """Shows nothing."""

    def show(self, what: str, part: float) -> None:
        pass

    def clear(self) -> None:
        pass


class TerminalProgress:
    """One line of a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, what: str, part: float) -> None:
        done = round(part * _BAR)
        bar = "#" * done + "-" * (_BAR - done)
        self._write(f"[{bar}] {part:4.0%} {what}"[:_WIDTH])

    def clear(self) -> None:
        self._write("")
        self._stream.write("\r")
        self._stream.flush()

    def _write(self, line: str) -> None:
        self._stream.write(f"\r{line:{_WIDTH}}")
        self._stream.flush()


def choose_progress(stream: TextIO | None = None) -> Progress:
    """A line on `stream`, standard error by itself, if it is a terminal."""
    chosen = sys.stderr if stream is None else stream
    return TerminalProgress(chosen) if chosen is not None and chosen.isatty() else NoProgress()

"""Telling a person which step an export is in. The library reports; the command line decides how it looks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Progress", "SilentProgress", "Steps"]


class Progress(Protocol):
    """Receives the steps of an export as they begin and end."""

    def started(self, step: str) -> None:
        """A step began; `step` is a verb: read, capture, rewrite, partition, reference, (prune), write, verify,
        (a variant), (latency), publish."""

    def finished(self, step: str, detail: str, seconds: float) -> None:
        """A step ended after `seconds` of wall time; `detail` says what came of it."""


class SilentProgress:
    """Reports nothing."""

    def started(self, step: str) -> None:
        """Nothing to say."""

    def finished(self, step: str, detail: str, seconds: float) -> None:
        """Nothing to say."""


class _Step:
    """One running step; `detail` may be set while it runs."""

    def __init__(self) -> None:
        self.detail = ""


class Steps:
    """Times the steps of one export and passes them on."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._seconds: list[tuple[str, float]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[_Step]:
        """Time the body as one step.

        An error inside is passed through, and the step is not counted as finished.
        """
        self._progress.started(name)
        begun_ns = time.perf_counter_ns()
        step = _Step()
        yield step
        seconds = (time.perf_counter_ns() - begun_ns) / 1e9
        self._seconds.append((name, seconds))
        self._progress.finished(name, step.detail, seconds)

    @property
    def seconds(self) -> tuple[tuple[str, float], ...]:
        """Wall time in seconds of every finished step, in order."""
        return tuple(self._seconds)

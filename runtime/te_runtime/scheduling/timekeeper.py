"""A thread that calls back at the moments that are asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable

from te_runtime.scheduling.survival import surviving

__all__ = ["Timekeeper"]


class Timekeeper:
    """Calls `ring` when the earliest moment asked for has come.

    `ring` returns the next moment, or None to sleep until one is asked for. Where it raises, it is called again.
    """

    __slots__ = ("_changed", "_clock_ns", "_ends", "_next_ns", "_ring", "_thread")

    def __init__(self, ring: Callable[[], int | None], clock_ns: Callable[[], int]) -> None:
        self._ring = ring
        self._clock_ns = clock_ns
        self._changed = threading.Condition(threading.Lock())
        self._next_ns: int | None = None
        self._ends = False
        self._thread = threading.Thread(target=self._keep, name="te_runtime-timekeeper", daemon=True)
        self._thread.start()

    def ask(self, moment_ns: int | None) -> None:
        """Have `ring` called at a moment, unless an earlier one is asked for already."""
        if moment_ns is None:
            return
        planned = self._next_ns
        if (
            planned is not None and planned <= moment_ns
        ):  # a glance without the lock: an early ring does no harm
            return
        with self._changed:
            if self._next_ns is None or moment_ns < self._next_ns:
                self._next_ns = moment_ns
                self._changed.notify()

    def stop(self) -> None:
        """Let the thread end."""
        with self._changed:
            self._ends = True
            self._changed.notify()

    def join(self, timeout_s: float | None) -> None:
        """Wait for the thread's end."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _keep(self) -> None:
        while True:
            with self._changed:
                while not self._ends:
                    left_ns = None if self._next_ns is None else self._next_ns - self._clock_ns()
                    if left_ns is not None and left_ns <= 0:
                        break
                    self._changed.wait(None if left_ns is None else left_ns / 1e9)
                if self._ends:
                    return
                self._next_ns = None
            moment_ns: int | None = self._clock_ns()
            with surviving():
                moment_ns = self._ring()
            self.ask(moment_ns)

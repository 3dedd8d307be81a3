"""The clock of `te-runtime bench`; one seam, so that tests tell the time themselves."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "LocalClock"]

_SLEEP_MARGIN_NS = 500_000  # sleeping wakes late by some 100 µs; the rest is waited for in circles


class Clock(Protocol):
    """Tells wall time and CPU time, and waits."""

    def wall_ns(self) -> int:
        """Nanoseconds since some fixed moment; never runs backwards."""

    def cpu_ns(self) -> int:
        """CPU nanoseconds that this process has used, all of its threads together."""

    def wait_until(self, wall_ns: int) -> None:
        """Return when wall_ns() has come to `wall_ns`; at once if it has passed."""


class LocalClock:
    """The clocks of this machine."""

    def wall_ns(self) -> int:
        return time.perf_counter_ns()

    def cpu_ns(self) -> int:
        return time.process_time_ns()

    def wait_until(self, wall_ns: int) -> None:
        while (left_ns := wall_ns - time.perf_counter_ns()) > 0:
            if left_ns > 2 * _SLEEP_MARGIN_NS:
                time.sleep((left_ns - _SLEEP_MARGIN_NS) / 1e9)

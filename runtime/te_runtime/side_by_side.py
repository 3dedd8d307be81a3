"""Several jobs on several threads: graphs load side by side, since ONNX Runtime lets go of Python's lock meanwhile.

Plain threads, because concurrent.futures would take 5 ms of every start to import.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from te_runtime.threads import usable_cpus

__all__ = ["side_by_side"]

T = TypeVar("T")

_MAX_THREADS = 4  # more of them load a bundle of many tails no faster: they wait for memory


def side_by_side(jobs: Sequence[Callable[[], T]], threads: int | None = None) -> list[T]:
    """Do every job and return what they gave, in the order of the jobs.

    Args:
        jobs: what to do, the longest first.
        threads: how many threads, the calling one among them; None for one per usable CPU, at most four.

    Raises:
        Whatever a job raised: of several the first in the order of the jobs. Jobs that run are finished before,
        others are not begun.
    """
    work = _Work(jobs)
    count = min(len(jobs), threads or min(usable_cpus(), _MAX_THREADS))
    helpers = [threading.Thread(target=work.go_on, daemon=True) for _ in range(count - 1)]
    for helper in helpers:
        helper.start()
    work.go_on()
    for helper in helpers:
        helper.join()
    return work.results()


class _Work(Generic[T]):
    """Jobs, how many of them were taken, and what came out."""

    def __init__(self, jobs: Sequence[Callable[[], T]]) -> None:
        self._jobs = jobs
        self._taken = 0
        self._lock = threading.Lock()
        self._found: dict[int, T] = {}
        self._errors: dict[int, BaseException] = {}

    def go_on(self) -> None:
        """Take jobs until there is none or one has failed."""
        while (number := self._take()) is not None:
            try:
                self._found[number] = self._jobs[number]()
            except BaseException as error:  # noqa: BLE001 - results() raises it on the thread that asked
                self._errors[number] = error

    def results(self) -> list[T]:
        if self._errors:
            raise self._errors[min(self._errors)]
        return [self._found[number] for number in range(len(self._jobs))]

    def _take(self) -> int | None:
        with self._lock:
            if self._errors or self._taken == len(self._jobs):
                return None
            self._taken += 1
            return self._taken - 1

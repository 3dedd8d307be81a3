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
        others are not begun; so it is after an interrupt too.
    """
    work = _Work(jobs)
    count = min(len(jobs), threads or min(usable_cpus(), _MAX_THREADS))
    try:
        for _ in range(count - 1):
            threading.Thread(target=work.go_on, daemon=True).start()
        work.go_on()
    finally:
        work.finish()
    return work.results()


class _Work(Generic[T]):
    """Jobs, how many of them were taken, who is at it, and what came out."""

    def __init__(self, jobs: Sequence[Callable[[], T]]) -> None:
        self._jobs = jobs
        self._taken = 0
        self._threads_at_work = 0
        self._is_finished = False
        self._changed = threading.Condition()
        self._found: dict[int, T] = {}
        self._errors: dict[int, BaseException] = {}

    def go_on(self) -> None:
        """Take jobs until there is none or one has failed."""
        while (number := self._take()) is not None:
            try:
                self._found[number] = self._jobs[number]()
            except BaseException as error:  # noqa: BLE001 - results() raises it on the thread that asked
                self._errors[number] = error
            finally:
                with self._changed:
                    self._threads_at_work -= 1
                    self._changed.notify_all()

    def finish(self) -> None:
        """Wait until no thread is at a job, through any number of interrupts: one that is inside ONNX Runtime
        while Python ends takes the process down. Thread.join does not do: interrupted, Python 3.11 believes
        that the thread has ended.
        """
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                with self._changed:
                    self._is_finished = True
                    while self._threads_at_work:
                        self._changed.wait()
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def results(self) -> list[T]:
        if self._errors:
            raise self._errors[min(self._errors)]
        return [self._found[number] for number in range(len(self._jobs))]

    def _take(self) -> int | None:
        with self._changed:
            if self._is_finished or self._errors or self._taken == len(self._jobs):
                return None
            self._taken += 1
            self._threads_at_work += 1
            return self._taken - 1

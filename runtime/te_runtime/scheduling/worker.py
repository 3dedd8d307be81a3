"""The thread of one executor."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from te_runtime.scheduling.dispatcher import Assignment
from te_runtime.scheduling.runner import Runner
from te_runtime.scheduling.survival import surviving

__all__ = ["Worker"]


class Worker:
    """Runs the batches that are put into its inbox, one after the other.

    The inbox holds numbers, and whoever takes a number's batch out of `_waiting` runs it: its thread, or the caller who
    waits for it.
    """

    __slots__ = ("_callers", "_inbox", "_stopping", "_stops", "_thread", "_waiting", "_work_here", "runner")

    def __init__(
        self,
        runner: Runner,
        work: Callable[[Runner, Assignment], None],
        work_here: Callable[[Runner, Assignment], None],
    ) -> None:
        """Start the thread.

        Args:
            runner: what runs the batches.
            work: called in the thread for every batch. What it raises is told as what a thread raises is.
            work_here: called instead in the thread of a caller who runs his batch himself. What it raises is his.
        """
        self.runner = runner
        self._work_here = work_here
        self._inbox: SimpleQueue[int | None] = SimpleQueue()
        self._waiting: dict[int, Assignment] = {}
        self._callers: dict[threading.Lock, int] = {}
        self._stopping = threading.Lock()
        self._stops = False
        self._thread = threading.Thread(
            target=_serve,
            args=(runner, self._inbox, self._waiting, work),
            name=f"te_runtime-{runner.name}",
            daemon=True,
        )
        self._thread.start()

    def put(self, assignment: Assignment) -> None:
        """Have a batch run."""
        number = assignment.batch.requests[0].sequence
        self._waiting[number] = assignment
        self._inbox.put(number)

    def give_back(self, assignment: Assignment) -> bool:
        """Have the thread run what a caller had taken; False where it takes nothing any more."""
        with self._stopping:
            if not self._stops:
                self.put(assignment)
            return not self._stops

    def run_here(self, number: int) -> None:
        """Run a batch in the calling thread, unless its own thread has begun it.

        A caller who waits for a batch of his alone would sleep while this thread wakes, and wake when it is done.

        Args:
            number: the sequence of the batch's first request.
        """
        assignment = self._waiting.pop(number, None)
        if assignment is None:
            return
        inside = threading.Lock()
        with inside:
            self._callers[inside] = threading.get_ident()
            try:
                self._work_here(self.runner, assignment)
            finally:
                del self._callers[inside]

    def stop(self) -> None:
        """Let the thread end after what its inbox holds."""
        with self._stopping:
            self._stops = True
            self._inbox.put(None)

    def join(self, timeout_s: float | None) -> bool:
        """Wait for the thread's end, and for callers that run a batch; False where it has not come."""
        for inside, caller in self._callers.copy().items():
            if caller != threading.get_ident() and inside.acquire(
                timeout=-1 if timeout_s is None else timeout_s
            ):
                inside.release()
        if self._thread is threading.current_thread():
            return False
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def _serve(
    runner: Runner,
    inbox: SimpleQueue[int | None],
    waiting: dict[int, Assignment],
    work: Callable[[Runner, Assignment], None],
) -> None:
    while (number := inbox.get()) is not None:
        assignment = waiting.pop(number, None)
        if assignment is None:  # its caller runs it
            continue
        with surviving():
            work(runner, assignment)
        del assignment  # or its rows and futures would live until the next batch

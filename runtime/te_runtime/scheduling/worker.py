"""The thread of one executor."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from te_runtime.scheduling.dispatcher import Assignment
from te_runtime.scheduling.runner import Runner
from te_runtime.scheduling.survival import surviving

__all__ = ["Worker"]


class Worker:
    """Runs the batches that are put into its inbox, one after the other."""

    __slots__ = ("_inbox", "_thread", "_work", "runner")

    def __init__(self, runner: Runner, work: Callable[[Runner, Assignment], None]) -> None:
        """Start the thread.

        Args:
            runner: what runs the batches.
            work: called for every batch. What it raises is told as what a thread raises is.
        """
        self.runner = runner
        self._work = work
        self._inbox: SimpleQueue[Assignment | None] = SimpleQueue()
        self._thread = threading.Thread(
            target=_serve, args=(runner, self._inbox, work), name=f"te_runtime-{runner.name}", daemon=True
        )
        self._thread.start()

    def put(self, assignment: Assignment) -> None:
        """Have a batch run."""
        self._inbox.put(assignment)

    def run_here(self) -> None:
        """Run the batch that its thread has not taken yet, if there is one, in the calling thread.

        A caller who waits for a batch of his alone would sleep while this thread wakes, and wake when it is done.
        """
        try:
            assignment = self._inbox.get_nowait()
        except Empty:
            return
        if assignment is None:
            self.stop()
            return
        with surviving():
            self._work(self.runner, assignment)

    def stop(self) -> None:
        """Let the thread end after what its inbox holds."""
        self._inbox.put(None)

    def join(self, timeout_s: float | None) -> bool:
        """Wait for the thread's end; False where it has not come."""
        if self._thread is threading.current_thread():
            return False
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def _serve(
    runner: Runner, inbox: SimpleQueue[Assignment | None], work: Callable[[Runner, Assignment], None]
) -> None:
    while (assignment := inbox.get()) is not None:
        with surviving():
            work(runner, assignment)
        del assignment  # or its rows and futures would live until the next batch

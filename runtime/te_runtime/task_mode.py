"""Mode task: one task runs its own graph, and weights are in memory once however many tasks are asked for.

Each task graph holds the trunk, and sessions cannot share what they packed. So a process that asks for one task has
that task's graph, and from its second task on the trunk and a tail for each: the first graph is let go of then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from te_runtime.forking import holding_back_forks
from te_runtime.memory import return_freed_memory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from te_runtime.executor import Executor
    from te_runtime.prediction import Prediction
    from te_runtime.row_parts import RowPart

__all__ = ["TaskModeExecutor"]


class TaskModeExecutor:
    """An Executor that runs the graph of the only task asked for so far, or the trunk and tails of several."""

    __slots__ = ("_alone", "_lock", "_open_alone", "_open_together", "_together")

    def __init__(self, open_alone: Callable[[], Executor], open_together: Callable[[], Executor]) -> None:
        """Defer everything.

        Args:
            open_alone: gives what answers each task by its own graph, none of which is loaded yet.
            open_together: gives what answers any tasks by trunk and tails; called again after it has raised.
        """
        self._open_alone = open_alone
        self._open_together = open_together
        self._alone: tuple[str, Executor] | None = None
        self._together: Executor | None = None
        # A signal handler may predict while the thread it interrupts is in here.
        self._lock = threading.RLock()

    def run(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, tasks: Sequence[str]
    ) -> dict[str, Prediction]:
        """As Executor.run."""
        return self._executor_for(tasks).run(feeds, rows, tasks)

    def run_parts(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, parts: Sequence[RowPart]
    ) -> list[Prediction]:
        """As Executor.run_parts."""
        return self._executor_for([part.task for part in parts]).run_parts(feeds, rows, parts)

    def prepare(self, tasks: Sequence[str]) -> None:
        """As Executor.prepare."""
        self._executor_for(tasks).prepare(tasks)

    def _executor_for(self, tasks: Sequence[str]) -> Executor:
        return self._together or self._alone_for(tasks) or self._choose(tasks)

    def _alone_for(self, tasks: Sequence[str]) -> Executor | None:
        alone = self._alone
        return alone[1] if alone is not None and len(tasks) == 1 and tasks[0] == alone[0] else None

    def _choose(self, tasks: Sequence[str]) -> Executor:
        # Forks first, then the lock: a thread that waits for a fork must not keep from the lock one that it waits for.
        with holding_back_forks(), self._lock:
            chosen = self._together or self._alone_for(tasks)
            if chosen is not None:
                return chosen
            if self._alone is None and len(tasks) == 1:
                self._alone = (tasks[0], self._open_alone())
                return self._alone[1]
            together = self._open_together()
            had_graph, self._together, self._alone = self._alone is not None, together, None
            if had_graph:
                return_freed_memory()
            return together

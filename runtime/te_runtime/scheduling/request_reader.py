"""What a caller asks for, checked and copied into a Request."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from te_runtime.errors import InputError
from te_runtime.inputs import InputReader
from te_runtime.scheduling.batch import InputLayout
from te_runtime.scheduling.options import parse_deadline_ns, parse_priority
from te_runtime.scheduling.request import Request
from te_runtime.task_choice import check_tasks

__all__ = ["RequestReader", "Rows"]

Rows: TypeAlias = NDArray[np.generic] | Mapping[str, NDArray[np.generic]]
"""As for Model.predict."""


class RequestReader:
    """Makes Requests, numbered in the order they come in; any thread may call it."""

    __slots__ = ("_alone", "_clock_ns", "_inputs", "_max_batch", "_read", "_sequence", "_tasks")

    def __init__(
        self,
        tasks: tuple[str, ...],
        inputs: Sequence[InputLayout],
        input_reader: InputReader,
        *,
        max_batch: int,
        clock_ns: Callable[[], int],
    ) -> None:
        """Make a reader.

        Args:
            tasks: of the model.
            inputs: of the model, in its order.
            input_reader: the model's.
            max_batch: the most rows of a request.
            clock_ns: the scheduler's.
        """
        self._tasks = tasks
        self._alone = {task: (task,) for task in tasks}
        self._inputs = tuple(inputs)
        self._read = input_reader.read
        self._max_batch = max_batch
        self._clock_ns = clock_ns
        self._sequence = itertools.count()

    def read(
        self,
        x: Rows,
        *,
        task: str | None,
        tasks: Sequence[str] | None,
        priority: float,
        deadline_ms: float | None,
    ) -> Request:
        """Check a request, all arguments as Scheduler.submit has them. Its clock starts here: the caller's own wait counts.

        Raises:
            InputError: one is not what it must be, or there are more rows than max_batch.
        """
        now_ns = self._clock_ns()
        if task is None:
            chosen = self._tasks if tasks is None else check_tasks(tasks, self._tasks)
        elif tasks is not None:
            raise InputError("task and tasks were both given: name one task, or a list of them")
        else:
            known = self._alone.get(task) if type(task) is str else None
            chosen = known or check_tasks([task], self._tasks)
        allowed_ns = None if deadline_ms is None else parse_deadline_ns(deadline_ms)
        points = 0.0 if type(priority) is int and priority == 0 else parse_priority(priority)
        feeds, rows = self._read(x)
        if rows > self._max_batch:
            raise InputError(
                f"x has {rows} rows, expected at most max_batch={self._max_batch}: make the scheduler with a larger "
                "max_batch, pass fewer rows, or call Model.predict for large batches"
            )
        data, row_shapes = [], []
        for name, _ in self._inputs:
            array = feeds[name]
            data.append(array.tobytes())
            row_shapes.append(array.shape[1:])
        return Request(
            tuple(data),
            tuple(row_shapes),
            rows,
            chosen,
            task is not None,
            points,
            None if allowed_ns is None else now_ns + allowed_ns,
            now_ns,
            next(self._sequence),
        )

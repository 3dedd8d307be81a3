"""Predicts when a request would be answered, to admit or refuse it, and keeps score of its predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from te_runtime.scheduling.batch import Batch
from te_runtime.scheduling.request import Request
from te_runtime.scheduling.request_queue import RequestQueue
from te_runtime.scheduling.resource_pool import Resource, ResourcePool, first_to_finish

__all__ = ["Controller"]

_ALPHA = 0.05
_Place: TypeAlias = tuple[int, int, int]
"""How many tasks are waited for, the full passes before a request, and, before any, the rows in its own batch before it."""
_Foreseen: TypeAlias = tuple[float, float]
"""When a request would be answered, and what the time until then is multiplied by to allow for deviations."""


class Controller:
    """Admission by prediction.

    Attributes:
        mean_error: running mean of (observed - expected) / expected over batches.
        mean_absolute_error: the same of its absolute value.
    """

    __slots__ = (
        "_foreseen",
        "_foreseen_at",
        "_foreseen_until_ns",
        "_max_batch",
        "_pool",
        "_queue",
        "mean_absolute_error",
        "mean_error",
    )

    def __init__(self, queue: RequestQueue, pool: ResourcePool, *, max_batch: int) -> None:
        self._queue = queue
        self._pool = pool
        self._max_batch = max_batch
        self._foreseen: dict[_Place, _Foreseen] = {}
        self._foreseen_at = -1
        self._foreseen_until_ns = 0
        self.mean_error = 0.0
        self.mean_absolute_error = 0.0

    def predict_finish_ns(self, request: Request, now_ns: int) -> float:
        """When a request would be answered if it were let in now.

        The rows that rank before it run first, in batches as large as may be, on whichever executor is free
        first; the request's own batch holds the rest of them and itself. What may yet come and rank before it is not
        foreseen. To the batches that lie ahead twice their usual deviation is added.
        """
        queue = self._queue
        tasks = max(queue.distinct_tasks, len(request.tasks))
        passes, rest = divmod(queue.rows_before(request.rank_ns) + request.rows - 1, self._max_batch)
        place = (tasks, passes, 0 if passes else rest)
        if self._pool.has_idle:
            finish, allowance = self._foresee(place, now_ns)
        else:
            if self._foreseen_at != self._pool.changes or now_ns >= self._foreseen_until_ns:
                self._foresee_anew()
            finish, allowance = self._foreseen.get(place) or self._foresee(place, now_ns)
            if now_ns < self._foreseen_until_ns:
                self._foreseen[place] = finish, allowance
        return now_ns + (finish - now_ns) * allowance

    def _foresee_anew(self) -> None:
        """Forget what was foreseen.

        While every executor is at work, and none of them late, it does not depend on the time, and holds for whoever
        else comes to the same place in the queue: under load that is most of those who ask.
        """
        self._foreseen.clear()
        self._foreseen_at = self._pool.changes
        self._foreseen_until_ns = min([one.free_at_ns for one in self._pool.live], default=0)

    def _foresee(self, place: _Place, now_ns: int) -> _Foreseen:
        tasks, passes, rest = place
        pool = self._pool
        live = pool.live or pool.resources
        rows = self._max_batch if passes else rest + 1
        if tasks > rows:
            tasks = rows
        free_at = [one.free_from_ns(now_ns) for one in live]
        if passes:
            _run_passes(free_at, [one.latency.expect_about(tasks, rows) for one in live], passes)
        number, finish = first_to_finish(live, free_at, tasks, rows)
        return finish, 1 + 2 * live[number].latency.deviation

    def relax_if_idle(self) -> None:
        """After a refusal: where nothing runs and nothing waits, bring expectations nearer to their seeds."""
        live = self._pool.live
        if not self._queue and all(one.batch is None for one in live):
            for one in live:
                one.latency.relax()

    def learn(self, resource: Resource, batch: Batch, observed_ns: int) -> None:
        """Hold an execution against its expectation, and correct what the expectation rests on."""
        expected = resource.latency.correct(batch.tasks, batch.rows, observed_ns)
        error = (observed_ns - expected) / expected
        self.mean_error += _ALPHA * (error - self.mean_error)
        self.mean_absolute_error += _ALPHA * (abs(error) - self.mean_absolute_error)


def _run_passes(free_at: list[int], full: list[float], passes: int) -> None:
    """Move `free_at` to when each executor is free after all of them together have run so many passes.

    Each pass goes where it is finished first. A queue may hold any number of passes, so most are counted, not walked
    through: until the moment at which as many would be done if they could be cut, each executor finishes as many as fit.

    Args:
        free_at: for each executor, when it can begin.
        full: for each executor, what a pass takes.
    """
    left = passes
    if passes > len(full):
        until = _done_ns(free_at, full, passes)
        for place, latency in enumerate(full):
            fit = max(0, int((until - free_at[place]) / latency))
            free_at[place] += round(fit * latency)
            left -= fit
    for _ in range(left):
        first = min(range(len(full)), key=lambda place: free_at[place] + full[place])
        free_at[first] += round(full[first])


def _done_ns(free_at: Sequence[int], full: Sequence[float], passes: int) -> float:
    """When so many passes would be done if each executor could do any part of one."""
    left, rate, until = float(passes), 0.0, 0.0
    for free, latency in sorted(zip(free_at, full, strict=True)):
        meanwhile = (free - until) * rate
        if meanwhile >= left:
            break
        left, until, rate = left - meanwhile, float(free), rate + 1.0 / latency
    return until + left / rate

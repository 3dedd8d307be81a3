"""Predicts when a request would be answered, to admit or refuse it, and keeps score of its predictions."""

from __future__ import annotations

from te_runtime.scheduling.batch import Batch
from te_runtime.scheduling.request import Request
from te_runtime.scheduling.request_queue import RequestQueue
from te_runtime.scheduling.resource_pool import Resource, ResourcePool

__all__ = ["Controller"]

_ALPHA = 0.05


class Controller:
    """Admission by prediction.

    Attributes:
        mean_error: running mean of (observed - expected) / expected over batches.
        mean_absolute_error: the same of its absolute value.
    """

    __slots__ = ("_max_batch", "_pool", "_queue", "mean_absolute_error", "mean_error")

    def __init__(self, queue: RequestQueue, pool: ResourcePool, *, max_batch: int) -> None:
        self._queue = queue
        self._pool = pool
        self._max_batch = max_batch
        self.mean_error = 0.0
        self.mean_absolute_error = 0.0

    def predict_finish_ns(self, request: Request, now_ns: int) -> float:
        """When a request would be answered if it were let in now.

        The rows that rank before it run first, in batches as large as may be, on whichever executor is free
        first; the request's own batch holds the rest of them and itself. What may yet come and rank before it is not
        foreseen. To the batches that lie ahead twice their usual deviation is added.
        """
        queue, max_batch = self._queue, self._max_batch
        live = self._pool.live or self._pool.resources
        tasks = max(queue.distinct_tasks, len(request.tasks))
        passes, rest = divmod(queue.rows_before(request.rank_ns) + request.rows - 1, max_batch)
        free_at = [one.free_from_ns(now_ns) for one in live]
        if passes:
            rest = max_batch - 1
            full = [one.latency.expect_about(min(tasks, max_batch), max_batch) for one in live]
            for _ in range(passes):
                first = min(range(len(live)), key=lambda place: free_at[place] + full[place])
                free_at[first] += round(full[first])
        own = [one.latency.expect_about(min(tasks, rest + 1), rest + 1) for one in live]
        finish, place = min((free_at[place] + own[place], place) for place in range(len(live)))
        return now_ns + (finish - now_ns) * (1 + 2 * live[place].latency.deviation)

    def learn(self, resource: Resource, batch: Batch, observed_ns: int) -> None:
        """Hold an execution against its expectation, and correct what the expectation rests on."""
        expected = resource.latency.correct(batch.tasks, batch.rows, observed_ns)
        error = (observed_ns - expected) / expected
        self.mean_error += _ALPHA * (error - self.mean_error)
        self.mean_absolute_error += _ALPHA * (abs(error) - self.mean_absolute_error)

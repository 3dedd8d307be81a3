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
        tasks = max(self._queue.distinct_tasks, len(request.tasks))
        ahead = self._queue.rows_before(request.rank_ns)
        live = self._pool.live or list(self._pool.resources)
        passes, rest = divmod(ahead + request.rows - 1, self._max_batch)
        own_rows = self._max_batch if passes else rest + 1
        free_at = [max(now_ns, resource.free_at_ns) for resource in live]
        full = [r.latency.expect_about(min(tasks, self._max_batch), self._max_batch) for r in live]
        while passes > 0:
            ends = [start + latency for start, latency in zip(free_at, full, strict=True)]
            first = ends.index(min(ends))
            free_at[first] = round(ends[first])
            passes -= 1
        finishes = [
            start + resource.latency.expect_about(min(tasks, own_rows), own_rows)
            for start, resource in zip(free_at, live, strict=True)
        ]
        finish = min(finishes)
        deviation = live[finishes.index(finish)].latency.deviation
        return now_ns + (finish - now_ns) * (1 + 2 * deviation)

    def learn(self, resource: Resource, batch: Batch, observed_ns: int) -> None:
        """Hold an execution against its expectation, and correct what the expectation rests on."""
        expected = resource.latency.correct(batch.tasks, batch.rows, observed_ns)
        error = (observed_ns - expected) / expected
        self.mean_error += _ALPHA * (error - self.mean_error)
        self.mean_absolute_error += _ALPHA * (abs(error) - self.mean_absolute_error)

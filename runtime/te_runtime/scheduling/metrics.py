"""What a scheduler has done: counts, distributions, and how well it foresaw."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from te_runtime.errors import InputError

if TYPE_CHECKING:
    from te_runtime.scheduling.request import Request
    from te_runtime.scheduling.resource_pool import ResourceState

__all__ = [
    "LATENCY_BUCKETS_MS",
    "ExecutorMetrics",
    "Histogram",
    "MetricsRecorder",
    "Refusal",
    "RequestOutcome",
    "SchedulerMetrics",
]

RequestOutcome = Literal["in_time", "late", "failed", "expired", "cancelled", "dropped"]
Refusal = Literal["queue_full", "deadline", "closed"]

_NS_PER_MS = 1e6
LATENCY_BUCKETS_MS = (
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1000.0,
    2500.0,
    10000.0,
)


@dataclass(frozen=True)
class Histogram:
    """How often values fell into buckets.

    Attributes:
        bounds: the largest value of each bucket but the last, which has none.
        counts: for each bucket; one more than bounds.
        total: the sum of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    def quantile(self, part: float) -> float | None:
        """The upper bound of the bucket that holds the quantile `part`, from 0 to 1.

        None where there were no values, or where it is in the last bucket, which has no bound.

        Raises:
            InputError: `part` is not from 0 to 1.
        """
        if not 0 <= part <= 1:
            raise InputError(f"quantile: found {part!r:.80}, expected a part from 0 to 1, such as 0.99")
        total = self.count
        seen = 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            seen += count
            if count and seen / total >= part:  # part * total may be rounded up
                return bound
        return None


@dataclass(frozen=True)
class ExecutorMetrics:
    """One executor.

    Attributes:
        name: such as `cpu-0`.
        state: `live`; `suspect` after a failure, until its requests were tried elsewhere; `stuck`; `out` for good.
        batches: how many it has answered.
        busy_s: seconds that it has spent on batches.
        utilization: that over the time since the scheduler began, 0 to 1.
        error: why it is not live.
    """

    name: str
    state: ResourceState
    batches: int
    busy_s: float
    utilization: float
    error: str | None


@dataclass(frozen=True)
class SchedulerMetrics:
    """Everything since the scheduler began. Of the requests let in, each has one outcome or is queued or running.

    Attributes:
        accepted: requests let in.
        refused: requests not let in, by reason.
        outcomes: requests that ended: answered `in_time` (all without a deadline are) or `late`; `failed` with an error of
            the graph; `expired` in the queue and never run; `cancelled` by the caller; `dropped` when it closed.
        queue_length: requests that wait now.
        running: requests that run now.
        batch_rows: rows of a batch → how many batches had as many.
        latency_ms: for each task, from submission to answer, of answered requests that asked for it.
        prediction_error: running mean of (observed - expected) / expected over batches.
        prediction_absolute_error: the same of its absolute value.
        executors: one entry each.
        uptime_s: seconds since the scheduler began.
    """

    accepted: int
    refused: Mapping[Refusal, int]
    outcomes: Mapping[RequestOutcome, int]
    queue_length: int
    running: int
    batch_rows: Mapping[int, int]
    latency_ms: Mapping[str, Histogram]
    prediction_error: float
    prediction_absolute_error: float
    executors: tuple[ExecutorMetrics, ...]
    uptime_s: float


class MetricsRecorder:
    """Counts for one scheduler. Any number of threads may use it at once."""

    __slots__ = ("_accepted", "_batch_rows", "_latencies", "_lock", "_outcomes", "_refused", "_totals")

    def __init__(self, tasks: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._accepted = 0
        self._refused: Counter[Refusal] = Counter()
        self._outcomes: Counter[RequestOutcome] = Counter()
        self._batch_rows: Counter[int] = Counter()
        self._latencies = {task: [0] * (len(LATENCY_BUCKETS_MS) + 1) for task in tasks}
        self._totals = dict.fromkeys(tasks, 0.0)

    def accepted(self) -> None:
        """Count a request that was let in; the caller holds the scheduler's lock, so no other is taken."""
        self._accepted += 1

    def refused(self, reason: Refusal) -> None:
        """Count a request that was not let in."""
        with self._lock:
            self._refused[reason] += 1

    def ended(self, outcome: RequestOutcome, count: int = 1) -> None:
        """Count requests that ended without an answer."""
        with self._lock:
            self._outcomes[outcome] += count

    def answered(self, requests: Sequence[Request], rows: int, done_ns: int) -> None:
        """Count a batch that was answered.

        Args:
            requests: what ran.
            rows: of all of them.
            done_ns: the clock's time of the answers.
        """
        totals, latencies = self._totals, self._latencies
        with self._lock:
            self._batch_rows[rows] += 1
            late = 0
            for request in requests:
                deadline_ns = request.deadline_ns
                late += deadline_ns is not None and done_ns > deadline_ns
                latency_ms = (done_ns - request.submitted_ns) / _NS_PER_MS
                bucket = bisect_left(LATENCY_BUCKETS_MS, latency_ms)
                for task in request.tasks:
                    latencies[task][bucket] += 1
                    totals[task] += latency_ms
            self._outcomes["late"] += late
            self._outcomes["in_time"] += len(requests) - late

    def report(
        self,
        *,
        queue_length: int,
        running: int,
        prediction_error: float,
        prediction_absolute_error: float,
        executors: tuple[ExecutorMetrics, ...],
        uptime_s: float,
    ) -> SchedulerMetrics:
        """Everything counted so far, beside what the scheduler knows at this moment."""
        with self._lock:
            return SchedulerMetrics(
                accepted=self._accepted,
                refused={reason: self._refused[reason] for reason in ("queue_full", "deadline", "closed")},
                outcomes={
                    outcome: self._outcomes[outcome]
                    for outcome in ("in_time", "late", "failed", "expired", "cancelled", "dropped")
                },
                queue_length=queue_length,
                running=running,
                batch_rows=dict(sorted(self._batch_rows.items())),
                latency_ms={
                    task: Histogram(LATENCY_BUCKETS_MS, tuple(counts), self._totals[task])
                    for task, counts in self._latencies.items()
                },
                prediction_error=prediction_error,
                prediction_absolute_error=prediction_absolute_error,
                executors=executors,
                uptime_s=uptime_s,
            )

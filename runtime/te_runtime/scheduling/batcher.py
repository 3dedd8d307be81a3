"""How many of the waiting requests run together, and whether it pays to wait for more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from te_runtime.scheduling.latency_model import LatencyModel
from te_runtime.scheduling.request import Request
from te_runtime.scheduling.request_queue import RequestQueue

__all__ = ["ArrivalGap", "Batcher", "Cut"]

_LONGEST_GAP_NS = 10_000_000.0
_ALPHA = 0.1
_PATIENT_GAPS = 3


class ArrivalGap:
    """The running mean of the time between two arrivals, and when the last one was."""

    __slots__ = ("last_ns", "mean_ns")

    def __init__(self) -> None:
        self.mean_ns = _LONGEST_GAP_NS
        self.last_ns: int | None = None

    def arrived(self, now_ns: int) -> None:
        """Count an arrival. A gap counts for 10 ms at most, so that a pause is forgotten within a few arrivals."""
        if self.last_ns is not None:
            gap = min(_LONGEST_GAP_NS, now_ns - self.last_ns)
            self.mean_ns += _ALPHA * (gap - self.mean_ns)
        self.last_ns = now_ns


class Cut(NamedTuple):
    """How many requests from the front of the queue make a batch.

    Attributes:
        size: how many requests, at least one.
        rows: they have.
        tasks: they ask for.
    """

    size: int
    rows: int
    tasks: frozenset[str]


class Batcher:
    """Makes the largest batch that does not spoil the earliest deadline in it.

    While an executor is idle, a batch that could grow is held back only as long as that pays: another request
    that joins saves the fixed cost of a pass of its own, and costs each waiting row the time until it comes. So
    with n rows waiting and arrivals `gap` apart, the batch is held while n · gap is less than the fixed cost; never
    longer than max_delay after the oldest came, nor past the moment at which its earliest deadline could just be kept,
    nor when arrivals have stopped. A lonely request is not held.
    """

    __slots__ = ("max_batch", "max_delay_ns")

    def __init__(self, *, max_batch: int, max_delay_ns: int) -> None:
        self.max_batch = max_batch
        self.max_delay_ns = max_delay_ns

    def cut(self, waiting: Iterable[Request], latency: LatencyModel, now_ns: int) -> Cut:
        """How many of `waiting`, from the first on, to run now on an executor that is free.

        Requests run together only while one row of theirs has the same shape: an open axis may give it another. A
        request that could not keep its deadline even in a batch of its own does not make the batch smaller.

        Args:
            waiting: at least one.
        """
        chosen: list[Request] = []
        rows = 0
        earliest: int | None = None
        tasks: set[str] = set()
        shapes: tuple[tuple[int, ...], ...] | None = None
        for request in waiting:
            if rows + request.rows > self.max_batch or (shapes is not None and request.row_shapes != shapes):
                break
            chosen.append(request)
            rows += request.rows
            tasks.update(request.tasks)
            shapes = request.row_shapes
            deadline = request.deadline_ns
            if deadline is not None and (earliest is None or deadline < earliest):
                earliest = deadline
        if earliest is None or now_ns + latency.expect(tasks, rows) <= earliest:
            return Cut(len(chosen), rows, frozenset(tasks))
        return _grow(chosen, latency, now_ns)

    def hold_until_ns(
        self, queue: RequestQueue, latency: LatencyModel, gap: ArrivalGap, now_ns: int
    ) -> int | None:
        """Until when to wait for more requests though an executor is idle; None to begin now."""
        rows = queue.rows
        if rows >= self.max_batch or gap.last_ns is None or rows * gap.mean_ns >= latency.fixed_ns():
            return None
        until = gap.last_ns + round(_PATIENT_GAPS * gap.mean_ns)
        oldest = min(request.submitted_ns for request in queue)
        until = min(until, oldest + self.max_delay_ns)
        deadline = queue.next_deadline_ns()
        if deadline is not None:
            longest = latency.expect_about(queue.distinct_tasks, rows + 1) * (1 + 2 * latency.deviation)
            until = min(until, deadline - round(longest))
        return until if until > now_ns else None


def _grow(chosen: list[Request], latency: LatencyModel, now_ns: int) -> Cut:
    """Add one request after the other while the earliest deadline among them is kept."""
    tasks: set[str] = set()
    count = rows = 0
    earliest: int | None = None
    for request in chosen:
        wider = tasks if tasks.issuperset(request.tasks) else tasks.union(request.tasks)
        finish = now_ns + latency.expect(wider, rows + request.rows)
        if earliest is not None and finish > earliest:
            break
        deadline = request.deadline_ns
        if deadline is not None:
            if finish <= deadline:
                earliest = deadline if earliest is None else min(earliest, deadline)
            elif count and now_ns + latency.expect(request.tasks, request.rows) <= deadline:
                break  # it would be in time alone, but not in this batch
        tasks, count, rows = wider, count + 1, rows + request.rows
    return Cut(count, rows, frozenset(tasks))

"""One request in the scheduler's care, and where it stands among others."""

from __future__ import annotations

from dataclasses import dataclass, field

from te_runtime.scheduling.request_future import RequestFuture

__all__ = ["Request", "rank_ns"]

_NS_PER_MS = 1_000_000


@dataclass(slots=True, eq=False)
class Request:
    """What one caller asked for.

    Attributes:
        data: for each input, in the model's order, the bytes of its rows: the scheduler's own copy.
        row_shapes: for each input the shape of one row, which an open axis may make another than other requests'.
        rows: how many rows, at least one.
        tasks: names of tasks, each once, in the caller's order.
        is_single: the caller named one task and expects its Prediction, not a dict of them.
        priority: points; more is served sooner.
        deadline_ns: the clock's time until which the answer is of use; None for no deadline.
        submitted_ns: the clock's time of its submission.
        sequence: counts submissions; settles ties.
        future: where the answer goes.
        rank_ns: where it stands in the queue, smallest first; see rank_ns.
        is_queued: kept by the queue.
        first_error: why it is run a second time.
    """

    data: tuple[bytes, ...]
    row_shapes: tuple[tuple[int, ...], ...]
    rows: int
    tasks: tuple[str, ...]
    is_single: bool
    priority: float
    deadline_ns: int | None
    submitted_ns: int
    sequence: int
    future: RequestFuture = field(default_factory=RequestFuture)
    rank_ns: int = 0
    is_queued: bool = False
    first_error: BaseException | None = None


def rank_ns(request: Request, *, capacity: float, patience_ns: int) -> int:
    """A number that sorts requests as their scores do, and stays the same while time passes.

    The score of request i is p_i - d_i / Σ r_j: its priority in points, minus the milliseconds left until its deadline
    over the capacity of all executors. Time takes the same from every d_i, so the order of two requests never
    changes while they wait; multiplied by -Σ r_j, and counted from the clock's zero, the score becomes

        deadline - priority · Σ r_j milliseconds        (smallest first)

    A request without a deadline ranks as if it had one `patience` after its submission. Nothing starves: whatever is
    submitted later than its rank + (highest priority · Σ r_j) ms ranks behind it.

    Args:
        capacity: Σ r_j; each executor counts 1.
        patience_ns: for requests without a deadline.
    """
    until = request.submitted_ns + patience_ns if request.deadline_ns is None else request.deadline_ns
    return until - round(request.priority * capacity * _NS_PER_MS)

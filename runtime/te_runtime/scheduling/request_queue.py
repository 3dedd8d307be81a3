"""Requests that wait, in the order of their rank; the earliest deadline among them is known as well."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from te_runtime.scheduling.request import Request

__all__ = ["RequestQueue"]

_Entry = tuple[int, int, Request]  # sequence numbers differ, so two requests are never compared
_SPARE_DEADLINES = 64


class RequestQueue:
    """A bounded queue. Inserting moves at most `capacity` pointers, which for thousands takes less than 1 µs.

    Attributes:
        capacity: how many requests may wait.
        rows: how many rows wait.
    """

    __slots__ = ("_deadlines", "_entries", "_tasks", "capacity", "rows")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows = 0
        self._entries: list[_Entry] = []
        self._deadlines: list[_Entry] = []  # a heap; entries of requests that left stay until they come up
        self._tasks: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        """The requests in order of rank."""
        return (entry[2] for entry in self._entries)

    @property
    def is_full(self) -> bool:
        """Whether a request more would be one too many."""
        return len(self._entries) >= self.capacity

    @property
    def distinct_tasks(self) -> int:
        """How many different tasks are waited for."""
        return len(self._tasks)

    def rows_before(self, rank: int) -> int:
        """About how many rows rank before a request of this rank; exact where every request has one row."""
        count = len(self._entries)
        if count == 0:
            return 0
        if self._entries[-1][0] <= rank:
            return self.rows
        return bisect_left(self._entries, (rank + 1,)) * self.rows // count

    def from_place(self, start: int) -> Iterator[Request]:
        """The requests from a place in the order on."""
        return (entry[2] for entry in islice(self._entries, start, None))

    def push(self, request: Request) -> None:
        """Let a request wait. The caller has looked at is_full."""
        request.is_queued = True
        insort(self._entries, (request.rank_ns, request.sequence, request))
        self.rows += request.rows
        for task in request.tasks:
            self._tasks[task] = self._tasks.get(task, 0) + 1
        if request.deadline_ns is not None:
            if len(self._deadlines) > 2 * len(self._entries) + _SPARE_DEADLINES:
                self._forget_deadlines_of_the_gone()
            heapq.heappush(self._deadlines, (request.deadline_ns, request.sequence, request))

    def take(self, start: int, count: int) -> list[Request]:
        """Take `count` requests out, from a place in the order on."""
        taken = [entry[2] for entry in self._entries[start : start + count]]
        del self._entries[start : start + count]
        for request in taken:
            self._left(request)
        self._forget_if_empty()
        return taken

    def remove(self, request: Request) -> bool:
        """Take one request out; False where it is not here (any more)."""
        if not request.is_queued:
            return False
        del self._entries[bisect_left(self._entries, (request.rank_ns, request.sequence))]
        self._left(request)
        self._forget_if_empty()
        return True

    def take_expired(self, now_ns: int) -> list[Request]:
        """Take out every request whose deadline has come."""
        expired = []
        while (deadline := self.next_deadline_ns()) is not None and deadline <= now_ns:
            request = heapq.heappop(self._deadlines)[2]
            self.remove(request)
            expired.append(request)
        return expired

    def next_deadline_ns(self) -> int | None:
        """The earliest deadline of those that wait."""
        while self._deadlines and not self._deadlines[0][2].is_queued:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def rerank(self, rank: Callable[[Request], int]) -> None:
        """Order anew, after the capacity of the executors changed."""
        waiting: Sequence[Request] = [entry[2] for entry in self._entries]
        for request in waiting:
            request.rank_ns = rank(request)
        self._entries = sorted((request.rank_ns, request.sequence, request) for request in waiting)

    def _left(self, request: Request) -> None:
        request.is_queued = False
        self.rows -= request.rows
        for task in request.tasks:
            left = self._tasks[task] - 1
            if left:
                self._tasks[task] = left
            else:
                del self._tasks[task]

    def _forget_if_empty(self) -> None:
        """Whoever has left is not kept alive by a deadline that nobody asks for."""
        if not self._entries:
            self._deadlines.clear()

    def _forget_deadlines_of_the_gone(self) -> None:
        self._deadlines = [entry for entry in self._deadlines if entry[2].is_queued]
        heapq.heapify(self._deadlines)

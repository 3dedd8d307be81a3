"""What a batch will take on one executor, learned from what batches took.

    latency(tasks, rows) = trunk(rows) + Σ tail(t) over the tasks of the batch

trunk is a curve through powers of two; between two of them it is straight. Every execution corrects what it
rests on by

    θ ← θ + α · (observed - expected)                                        (the controller's rule)

where a part θ takes the share of the error that it had of the expectation, so that nothing becomes negative, and a
set of tasks that never ran before is expected from its parts. Of two powers of two around a batch each takes the
correction in so far as the batch is near it: half way between them, half of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias

__all__ = ["LatencyModel"]

_LEAST_NS = 1.0
_Place: TypeAlias = tuple[int, int, float]
"""The numbers of two knots, and how far from the first to the second, 0 to 1."""


class LatencyModel:
    """Expected latencies of one executor, in nanoseconds.

    Attributes:
        deviation: how far observations are from expectations, as a part of these; a running mean, in which one
            execution counts for 1 at most, so that a single pause does not have everything refused for a while.
    """

    __slots__ = ("_alpha", "_knots", "_mean_tail", "_places", "_seeds", "_tails", "_trunk", "deviation")

    def __init__(
        self, trunk_ns: Mapping[int, float], tails_ns: Mapping[str, float], *, alpha: float = 0.1
    ) -> None:
        """Begin with what warming up measured.

        Args:
            trunk_ns: rows → latency of the trunk; the rows are 1, 2, 4 and so on, the last as large as any batch.
            tails_ns: for every task, latency of its tail.
            alpha: the part of an error that one execution corrects, above 0 and at most 1.
        """
        self._alpha = alpha
        self._knots = sorted(trunk_ns)
        self._places: dict[int, _Place] = {}
        self._trunk = [max(_LEAST_NS, float(trunk_ns[rows])) for rows in self._knots]
        self._tails = {task: max(_LEAST_NS, float(latency)) for task, latency in tails_ns.items()}
        self._mean_tail = sum(self._tails.values()) / len(self._tails)
        self._seeds = tuple(self._trunk), dict(self._tails)
        self.deviation = 0.0

    @property
    def largest_batch(self) -> int:
        """The most rows that it knows about."""
        return self._knots[-1]

    def expect(self, tasks: Collection[str], rows: int) -> float:
        """The expected latency of a batch of `rows` rows that needs the tails of `tasks`."""
        tails = self._tails
        expected = self._trunk_ns(rows)
        for task in tasks:
            expected += tails[task]
        return expected

    def expect_about(self, task_count: int, rows: int) -> float:
        """The same where only the number of tasks is known."""
        return self._trunk_ns(rows) + task_count * self._mean_tail

    def fixed_ns(self) -> float:
        """What a pass costs however few rows it has: a pass of one row, less that row's share."""
        largest = self._knots[-1]
        if largest == 1:
            return 0.0
        slope = max(0.0, (self._trunk[-1] - self._trunk[0]) / (largest - 1))
        return max(0.0, self._trunk[0] + self._mean_tail - slope)

    def correct(self, tasks: Collection[str], rows: int, observed_ns: float) -> float:
        """Learn from one execution.

        Returns:
            The expectation it is held against, nanoseconds.
        """
        expected = self.expect(tasks, rows)
        error = observed_ns - expected
        self.deviation += self._alpha * (min(1.0, abs(error) / expected) - self.deviation)
        scale = 1.0 + self._alpha * error / expected  # of every part, by its share of the expectation
        low, high, weight = self._place(rows)
        trunk = self._trunk
        trunk[low] = max(_LEAST_NS, trunk[low] * (1.0 + (scale - 1.0) * (1.0 - weight)))
        trunk[high] = max(_LEAST_NS, trunk[high] * (1.0 + (scale - 1.0) * weight))
        for task in tasks:
            old = self._tails[task]
            new = self._tails[task] = max(_LEAST_NS, old * scale)
            self._mean_tail += (new - old) / len(self._tails)
        return expected

    def relax(self) -> None:
        """Bring what is above its seed nearer to it.

        Where a passing disturbance made expectations so long that every request is refused, nothing would ever run
        to correct them.
        """
        trunk, tails = self._seeds
        alpha = self._alpha
        self._trunk = [
            now + alpha * min(0.0, seed - now) for now, seed in zip(self._trunk, trunk, strict=True)
        ]
        self._tails = {task: now + alpha * min(0.0, tails[task] - now) for task, now in self._tails.items()}
        self._mean_tail = sum(self._tails.values()) / len(self._tails)
        self.deviation -= alpha * self.deviation

    def _trunk_ns(self, rows: int) -> float:
        low, high, weight = self._places.get(rows) or self._place(rows)
        below = self._trunk[low]
        return below + weight * (self._trunk[high] - below)

    def _place(self, rows: int) -> _Place:
        """The knots around `rows`; kept, since every request asks for some of the same few numbers of rows."""
        last = len(self._knots) - 1
        high = min((rows - 1).bit_length(), last)
        low = max(0, high - 1)
        below, above = self._knots[low], self._knots[high]
        place = low, high, min(1.0, (rows - below) / (above - below)) if high else 0.0
        if rows <= above:
            self._places[rows] = place
        return place

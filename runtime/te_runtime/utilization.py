"""How a loaded model's experts are used: the mean routing weights of the rows that predict has seen.

A call only keeps a copy of its routing weights; every 256 calls one caller adds them up. Keeping is an append
to a deque and adding up pops from it, both atomic, so callers never wait for each other and every row counts
once.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter, is_not
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from te_runtime.errors import BundleError
from te_runtime.manifest import Manifest
from te_runtime.prediction import Prediction

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Utilization", "UtilizationCounter"]

_WEIGHTS_OF = attrgetter("routing_weights")
_IS_THERE = partial(is_not, None)
_CALLS_KEPT = 256
_BYTES_KEPT = 2**14  # a call with more routing weights is added up at once: it is long anyway


class Utilization(NamedTuple):
    """How one task used each expert.

    Attributes:
        rows: rows that predict answered for this task and that are in `mean`.
        rows_not_finite: further rows, left out because their routing weights were NaN.
        mean: mean routing weight of each expert over `rows`; None before the first row.
        baseline: the same over the exporter's ordinary verification rows; None where the bundle has none.
        distance: total-variation distance between the two, half the sum of absolute differences: 0 for the
            same use, 1 for no expert in common. None where one of them is missing.
    """

    rows: int
    rows_not_finite: int
    mean: tuple[float, ...] | None
    baseline: tuple[float, ...] | None
    distance: float | None


class _Sums:
    """Sums of one task's routing weights, in float64."""

    __slots__ = ("rows", "rows_not_finite", "total")

    def __init__(self, experts: int) -> None:
        self.rows = 0
        self.rows_not_finite = 0
        self.total = np.zeros(experts)

    def add(self, weights: NDArray[np.generic]) -> None:
        """Add routing weights (B, K)."""
        total = weights.sum(axis=0, dtype=np.float64)
        if not np.isfinite(total).all():
            kept = weights[np.isfinite(weights).all(axis=1)]
            self.rows_not_finite += len(weights) - len(kept)
            weights, total = kept, kept.sum(axis=0, dtype=np.float64)
        self.rows += len(weights)
        self.total += total


class UtilizationCounter:
    """Counts for one model. Any number of threads may use it at once."""

    def __init__(self, manifest: Manifest) -> None:
        """Make a counter for the tasks that have a gate.

        Raises:
            BundleError: a baseline has another number of experts than its task.
        """
        self._experts: dict[str, int] = {}
        self._dtypes: dict[str, np.dtype[np.generic]] = {}
        for task in manifest.tasks:
            spec = task.routing_weights
            if spec is not None:
                self._experts[task.name] = math.prod(axis for axis in spec.shape[1:] if isinstance(axis, int))
                self._dtypes[task.name] = np.dtype(spec.dtype)
        row_bytes = sum(count * self._dtypes[task].itemsize for task, count in self._experts.items())
        self._rows_kept = _BYTES_KEPT // max(1, row_bytes)
        self._baselines = _baselines(manifest, self._experts)
        self._sums = self._zeros()
        self._seen: deque[tuple[tuple[str, ...], int, bytes]] = deque()
        self._lock = threading.Lock()

    def add(self, tasks: tuple[str, ...], predictions: Mapping[str, Prediction], rows: int) -> None:
        """Count the routing weights of one call.

        Args:
            tasks: what was asked for.
            predictions: what the call answered, before the caller can change it.
            rows: how many rows it had.
        """
        if rows <= self._rows_kept:
            seen = self._seen
            weights = filter(_IS_THERE, map(_WEIGHTS_OF, predictions.values()))
            # Arrays are buffers, which numpy's types tell only for newer Pythons; join copies them at once.
            seen.append((tasks, rows, b"".join(cast("Iterator[memoryview]", weights))))
            if len(seen) >= _CALLS_KEPT and self._lock.acquire(blocking=False):
                try:
                    self._add_up()
                finally:
                    self._lock.release()
            return
        with self._lock:
            for task, prediction in predictions.items():
                if prediction.routing_weights is not None and task in self._sums:
                    self._sums[task].add(prediction.routing_weights.reshape(rows, -1))

    def report(self, *, reset: bool = False) -> dict[str, Utilization]:
        """What was counted so far, per task that has a gate; with `reset`, counting begins again."""
        with self._lock:
            self._add_up()
            sums = self._sums
            found = {task: _report(own, self._baselines.get(task)) for task, own in sums.items()}
            if reset:
                self._sums = self._zeros()
        return found

    def _zeros(self) -> dict[str, _Sums]:
        return {task: _Sums(experts) for task, experts in self._experts.items()}

    def _add_up(self) -> None:
        """Take what calls have kept so far; the caller holds the lock."""
        alike: dict[tuple[tuple[str, ...], int], list[bytes]] = {}
        for _ in range(len(self._seen)):
            tasks, rows, data = self._seen.popleft()
            alike.setdefault((tasks, rows), []).append(data)
        for (tasks, rows), parts in alike.items():
            calls = np.frombuffer(b"".join(parts), dtype=np.uint8).reshape(len(parts), -1)
            start = 0
            for task in tasks:
                if task in self._experts:
                    stop = start + rows * self._experts[task] * self._dtypes[task].itemsize
                    own = np.ascontiguousarray(calls[:, start:stop]).view(self._dtypes[task])
                    self._sums[task].add(own.reshape(-1, self._experts[task]))
                    start = stop


def _baselines(manifest: Manifest, experts: Mapping[str, int]) -> dict[str, tuple[float, ...]]:
    found = {}
    for entry in manifest.utilization:
        expected = experts.get(entry.task)
        if expected is None:
            continue
        if len(entry.mean) != expected:
            raise BundleError(
                f"utilization of task {entry.task!r} has {len(entry.mean)} experts, its routing weights have "
                f"{expected}. Export the model again."
            )
        found[entry.task] = entry.mean
    return found


def _report(sums: _Sums, baseline: Sequence[float] | None) -> Utilization:
    if sums.rows == 0:
        mean, distance = None, None
    else:
        mean = sums.total / sums.rows
        distance = None if baseline is None else float(np.abs(mean - np.array(baseline)).sum() / 2)
    return Utilization(
        rows=sums.rows,
        rows_not_finite=sums.rows_not_finite,
        mean=None if mean is None else tuple(mean.tolist()),
        baseline=None if baseline is None else tuple(baseline),
        distance=distance,
    )

"""Measures what batches take before the first request comes, to begin the latency model with."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from te_runtime.forking import holding_back_forks
from te_runtime.row_parts import RowPart
from te_runtime.scheduling.latency_model import LatencyModel
from te_runtime.scheduling.resource_pool import Resource
from te_runtime.scheduling.runner import Runner

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["batch_knots", "measure_executors", "measure_latency"]

_TIMED = 3


def batch_knots(max_batch: int) -> list[int]:
    """1, 2, 4 and so on below `max_batch`, and itself."""
    knots = [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch]
    return [*knots, max_batch]


def measure_latency(
    runner: Runner,
    rows: Mapping[str, NDArray[np.generic]],
    tasks: Sequence[str],
    *,
    max_batch: int,
    clock_ns: Callable[[], int],
) -> LatencyModel:
    """Run one task and all tasks at every size that the model keeps, and tell trunk and tails apart.

    Args:
        rows: input name → array of some rows, at least one, which are repeated as needed.
        tasks: every task.
    """
    count = len(next(iter(rows.values())))
    trunk: dict[int, float] = {}
    tails: list[float] = []
    for size in batch_knots(max_batch):
        feeds = {name: np.ascontiguousarray(array[np.arange(size) % count]) for name, array in rows.items()}
        one = _time(runner, feeds, size, tasks[:1], clock_ns)
        if len(tasks) > 1:
            every = _time(runner, feeds, size, tasks[:size], clock_ns)
            others = min(size, len(tasks)) - 1
            if others:
                tails.append(max(0.0, every - one) / others)
        trunk[size] = one
    tail = statistics.median(tails) if tails else 0.0
    return LatencyModel(
        {size: max(one - tail, one / 2) for size, one in trunk.items()}, dict.fromkeys(tasks, tail)
    )


def _time(
    runner: Runner,
    feeds: Mapping[str, NDArray[np.generic]],
    rows: int,
    tasks: Sequence[str],
    clock_ns: Callable[[], int],
) -> float:
    """The median latency of a batch whose rows are dealt out to the tasks evenly, nanoseconds."""
    edges = [round(number * rows / len(tasks)) for number in range(len(tasks) + 1)]
    spans = list(itertools.pairwise(edges))
    parts = [
        RowPart(task, None if (start, stop) == (0, rows) else slice(start, stop), stop - start)
        for task, (start, stop) in zip(tasks, spans, strict=True)
    ]
    runner.run(feeds, rows, parts)
    samples = []
    for _ in range(_TIMED):
        begun = clock_ns()
        runner.run(feeds, rows, parts)
        samples.append(clock_ns() - begun)
    return float(statistics.median(samples))


def measure_executors(
    runners: Sequence[Runner], rows: Mapping[str, NDArray[np.generic]], tasks: Sequence[str], max_batch: int
) -> list[Resource]:
    """Measure every executor while the others work too, as they will.

    Args:
        runners: one for each executor.
        rows, tasks, max_batch: as for measure_latency.
    """

    def measure(runner: Runner) -> Resource:
        with (
            holding_back_forks()
        ):  # here: a fork that waited for the caller would keep these threads from loading
            latency = measure_latency(runner, rows, tasks, max_batch=max_batch, clock_ns=time.perf_counter_ns)
        return Resource(runner.name, latency)

    with ThreadPoolExecutor(len(runners)) as pool:
        return list(pool.map(measure, runners))

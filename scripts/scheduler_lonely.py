"""What the scheduler adds to one request that nobody else competes with."""

from __future__ import annotations

import time

import numpy as np
from scheduler_load import Stream

import te_runtime

__all__ = ["measure_lonely"]


def measure_lonely(
    model: te_runtime.Model, scheduler: te_runtime.Scheduler, stream: Stream, *, calls: int, pause_s: float
) -> tuple[float, float]:
    """A direct predict and a request through the scheduler in turn.

    Args:
        pause_s: between them; with a pause threads sleep, and caches and clocks cool down.

    Returns:
        The median of the direct calls, and of the differences, in µs.
    """
    clock_ns = time.perf_counter_ns
    direct, extra = [], []
    for _, (row, task) in zip(range(calls), stream, strict=False):
        time.sleep(pause_s)
        begun = clock_ns()
        model.predict(row, [task])
        between = clock_ns()
        time.sleep(pause_s)
        again = clock_ns()
        scheduler.submit(row, task=task).result()
        direct.append(between - begun)
        extra.append(clock_ns() - again - (between - begun))
    return float(np.median(direct)) / 1e3, float(np.median(extra)) / 1e3

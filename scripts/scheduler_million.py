"""Sends a million requests and looks for growth and for requests that ended twice or never.

    python scripts/scheduler_million.py BUNDLE [REQUESTS]

Every 16th request has a deadline that is often too short, and every 16th is cancelled at once, so that requests end in
every way. Prints JSON. A process of its own, so that nothing else grows in it.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections import deque
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

from scheduler_load import Stream

import te_runtime
from te_runtime.bench_memory import read_pss_bytes

_WINDOW = 256
_SAMPLES = 20
_SETTLED = 10_000
_DEADLINES_MS = (0.05, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 1000.0)


class Tally:
    """Counts what becomes of requests, by futures' own callbacks and by what their callers see."""

    def __init__(self) -> None:
        self.seen = {"answered": 0, "cancelled": 0, "expired": 0, "refused": 0}
        self.ends = itertools.count()

    def told(self, _: Future[Any]) -> None:
        """A future has ended."""
        next(self.ends)

    def take(self, future: Future[Any]) -> None:
        """Wait for a future's end."""
        try:
            future.result()
        except CancelledError:
            self.seen["cancelled"] += 1
        except te_runtime.DeadlineError:
            self.seen["expired"] += 1
        else:
            self.seen["answered"] += 1


def send_all(scheduler: te_runtime.Scheduler, stream: Stream, requests: int, tally: Tally) -> list[list[int]]:
    """Keep a window of requests outstanding until all were sent and have ended.

    Returns:
        Now and then: how many were sent, RSS and PSS in bytes.
    """
    waiting: deque[Future[Any]] = deque()
    sizes = []
    deadlines = itertools.cycle(_DEADLINES_MS)
    for number, (row, task) in enumerate(itertools.islice(stream, requests)):
        if number == _SETTLED or (number > _SETTLED and number % (requests // _SAMPLES) == 0):
            sizes.append([number, *read_sizes()])
        deadline_ms = next(deadlines) if number % 16 == 0 else None
        try:
            future = scheduler.submit(row, task=task, deadline_ms=deadline_ms)
        except te_runtime.DeadlineError:
            tally.seen["refused"] += 1
            continue
        future.add_done_callback(tally.told)
        if number % 16 == 8:
            future.cancel()
        waiting.append(future)
        while len(waiting) >= _WINDOW or (waiting and waiting[0].done()):
            tally.take(waiting.popleft())
    while waiting:
        tally.take(waiting.popleft())
    sizes.append([requests, *read_sizes()])
    return sizes


def read_sizes() -> tuple[int, int]:
    """RSS and PSS in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096, read_pss_bytes() or 0


def check(tally: Tally, metrics: te_runtime.SchedulerMetrics, requests: int) -> None:
    """Every request has ended once, and everybody who counts agrees."""
    ends = next(tally.ends)
    found = {
        "seen by callers": sum(tally.seen.values()),
        "ends and refusals": ends + tally.seen["refused"],
        "accepted and refused": metrics.accepted + sum(metrics.refused.values()),
        "outcomes and refused": sum(metrics.outcomes.values()) + sum(metrics.refused.values()),
    }
    wrong = {what: count for what, count in found.items() if count != requests}
    if wrong or metrics.queue_length or metrics.running:
        raise SystemExit(f"{requests} requests were sent; found {wrong or metrics}")


def main() -> None:
    bundle, requests = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000
    tally = Tally()
    with te_runtime.load(bundle, threads=1) as model:
        scheduler = te_runtime.Scheduler(model)
        begun = time.perf_counter()
        width = next(axis for axis in model.inputs[0].shape[1:] if isinstance(axis, int))
        sizes = send_all(scheduler, Stream(model.tasks, width=width, seed=0), requests, tally)
        seconds = time.perf_counter() - begun
        scheduler.close()
        check(tally, scheduler.metrics(), requests)
    print(json.dumps({"requests": requests, "seconds": seconds, "ended": tally.seen, "sizes": sizes}))


if __name__ == "__main__":
    main()

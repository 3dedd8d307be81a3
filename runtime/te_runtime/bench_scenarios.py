"""Calls made one after another: the closed loop behind the scenarios single-stream, multi-stream and offline.

They differ in the rows of a call alone; open-loop arrivals are in bench_server. Nothing here knows of models: what is
timed is a callable that takes the number of the query.
"""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from te_runtime.bench_clock import Clock

__all__ = ["Call", "Tick", "Timed", "WarmUp", "measure_calls", "measure_pairs", "warm_up"]

Call: TypeAlias = Callable[[int], object]
"""Answers query number n, from 0."""
Tick: TypeAlias = Callable[[float], None]
"""Hears how much of a measurement is done, from 0 to 1; called between two calls."""

TICKS = 20
MAX_WARM_CALLS = 1000
_BLOCK = 10
_SETTLED_WITHIN = 0.05


@dataclass(frozen=True)
class WarmUp:
    """Calls made before any is timed.

    Attributes:
        calls: how many.
        settled: whether the medians of two tens of calls in a row came within 5 % of each other before the calls
            or the time allowed ran out.
    """

    calls: int
    settled: bool


@dataclass(frozen=True)
class Timed:
    """Calls that were timed.

    Attributes:
        rows_per_call: rows of each.
        latencies_ns: wall time of each call in nanoseconds, in order.
        wall_ns: wall time that they took together, with what lies between them if they ran alone.
        cpu_ns: CPU time that the process used meanwhile.
        is_interrupted: Ctrl-C ended it early.
    """

    rows_per_call: int
    latencies_ns: Sequence[int]
    wall_ns: int
    cpu_ns: int
    is_interrupted: bool

    @property
    def rows(self) -> int:
        """Rows answered."""
        return self.rows_per_call * len(self.latencies_ns)

    @property
    def rows_per_s(self) -> float:
        """Throughput."""
        return self.rows * 1e9 / max(1, self.wall_ns)


def warm_up(call: Call, clock: Clock, *, limit_ns: int) -> WarmUp:
    """Call until the latency settles, or 1,000 calls or `limit_ns` have gone; at least once."""
    begun = clock.wall_ns()
    blocks: list[float] = []
    block: list[int] = []
    calls = 0
    while calls < MAX_WARM_CALLS:
        started = clock.wall_ns()
        call(calls)
        now = clock.wall_ns()
        calls += 1
        block.append(now - started)
        if len(block) == _BLOCK:
            blocks.append(statistics.median(block))
            block = []
            if len(blocks) > 1 and abs(blocks[-1] - blocks[-2]) <= _SETTLED_WITHIN * blocks[-2]:
                return WarmUp(calls, True)
        if now - begun >= limit_ns:
            break
    return WarmUp(calls, False)


def measure_calls(call: Call, clock: Clock, *, rows_per_call: int, duration_ns: int, tick: Tick) -> Timed:
    """Make calls one after another until the time is over; at least one.

    An interrupt ends it: what was timed until then is returned.
    """
    latencies = array("q")
    begun, cpu_begun = clock.wall_ns(), clock.cpu_ns()
    now, is_interrupted = begun, False
    next_tick = begun + duration_ns // TICKS
    try:
        while not latencies or now - begun < duration_ns:
            started = clock.wall_ns()
            call(len(latencies))
            now = clock.wall_ns()
            latencies.append(now - started)
            if now >= next_tick:
                tick(min(1.0, (now - begun) / duration_ns))
                next_tick += duration_ns // TICKS
    except KeyboardInterrupt:
        is_interrupted = True
    return Timed(rows_per_call, latencies, now - begun, clock.cpu_ns() - cpu_begun, is_interrupted)


def measure_pairs(
    calls: tuple[Call, Call], clock: Clock, *, rows_per_call: int, duration_ns: int, tick: Tick
) -> tuple[Timed, Timed]:
    """Time two callables in turn, A B, B A, A B, …, until the time is over; at least one pair.

    A turn is one call that is not timed, which brings a model's weights back into the caches, and one that is. An
    interrupt ends it: the pairs that were whole are returned.
    """
    latencies, cpu = (array("q"), array("q")), (array("q"), array("q"))
    begun = now = clock.wall_ns()
    next_tick = begun + duration_ns // TICKS
    is_interrupted = False
    try:
        while not cpu[1] or now - begun < duration_ns:
            number = len(latencies[0])
            order = (0, 1) if number % 2 == 0 else (1, 0)
            turns = {which: _turn(calls[which], number, clock) for which in order}
            for which, (wall_ns, cpu_ns) in turns.items():
                latencies[which].append(wall_ns)
                cpu[which].append(cpu_ns)
            now = clock.wall_ns()
            if now >= next_tick:
                tick(min(1.0, (now - begun) / duration_ns))
                next_tick += duration_ns // TICKS
    except KeyboardInterrupt:
        is_interrupted = True
    whole = min(map(len, (*latencies, *cpu)))
    first, second = (
        Timed(rows_per_call, times[:whole], sum(times[:whole]), sum(used[:whole]), is_interrupted)
        for times, used in zip(latencies, cpu, strict=True)
    )
    return first, second


def _turn(call: Call, number: int, clock: Clock) -> tuple[int, int]:
    """Wall and CPU time of a call in nanoseconds."""
    call(number)
    cpu_begun, begun = clock.cpu_ns(), clock.wall_ns()
    call(number)
    wall_ns = clock.wall_ns() - begun
    return wall_ns, clock.cpu_ns() - cpu_begun

"""The scenario server: queries of one row that arrive whether or not the last one is answered.

Arrivals are a Poisson process with a seed. A query's latency counts from when it was to arrive, not from when its
turn came, so that a slow answer is paid for by every query that waited behind it (no coordinated omission). One
caller answers them in the order of arrival.

The highest rate is found by halving an interval; the gaps between arrivals are the same random numbers at every rate,
only scaled. A rate that fails is tried once more, since one hiccup of the machine must not decide the search. What was
found is then confirmed with other random numbers, and lowered by 15 %, and again, where it does not hold.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from te_runtime.bench_clock import Clock
from te_runtime.bench_samples import percentile
from te_runtime.bench_scenarios import Call, Tick, Timed

__all__ = ["QUERIES_FOR_P99", "Found", "Trial", "find_rate", "poisson_arrivals_ns", "run_trial"]

HALVINGS = 6
CONFIRMATIONS = 6
BACK_OFF = 0.85
TRIALS_AT_MOST = 2 * HALVINGS + CONFIRMATIONS
QUERIES_FOR_P99 = math.ceil(math.log(0.01) / math.log(0.99))
"""How many queries must all keep a bound to be 99 % sure that 99 of 100 do: 0.99^n is to be at most 0.01."""
_GIVE_UP_AFTER = 2  # durations


@dataclass(frozen=True)
class Trial:
    """One rate, tried.

    Attributes:
        rate_per_s: queries per second asked for.
        bound_ns: what p99 was to stay within.
        timed: one row per call; latencies count from the scheduled arrival, CPU time is that of the calls.
        p99_ns: of the latencies.
        gave_up: the queries waiting grew until the trial was ended early.
    """

    rate_per_s: float
    bound_ns: int
    timed: Timed
    p99_ns: float
    gave_up: bool

    @property
    def holds(self) -> bool:
        """Whether the bound was kept."""
        return not self.gave_up and not self.timed.is_interrupted and self.p99_ns <= self.bound_ns


@dataclass(frozen=True)
class Found:
    """What the search found.

    Attributes:
        best: the trial that confirmed the highest rate; None if none held, or an interrupt came before.
        trials: all of them, in order.
        is_interrupted: Ctrl-C ended it early.
    """

    best: Trial | None
    trials: tuple[Trial, ...]
    is_interrupted: bool


def poisson_arrivals_ns(rate_per_s: float, duration_ns: int, seed: int) -> Sequence[int]:
    """Moments of arrival in [0, duration), in nanoseconds; at least one, the first at 0."""
    rng = random.Random(seed)
    arrivals, now = array("q", [0]), rng.expovariate(1.0) * 1e9 / rate_per_s
    while now < duration_ns:
        arrivals.append(round(now))
        now += rng.expovariate(1.0) * 1e9 / rate_per_s
    return arrivals


def run_trial(
    call: Call, clock: Clock, *, rate_per_s: float, bound_ns: int, duration_ns: int, seed: int
) -> Trial:
    """Answer queries that arrive at a rate; gives up when the run takes twice its duration."""
    arrivals = poisson_arrivals_ns(rate_per_s, duration_ns, seed)
    latencies = array("q")
    cpu_ns, is_interrupted, gave_up = 0, False, False
    begun = now = clock.wall_ns()
    try:
        for number, arrival in enumerate(arrivals):
            clock.wait_until(begun + arrival)
            cpu_begun = clock.cpu_ns()
            call(number)
            now = clock.wall_ns()
            cpu_ns += clock.cpu_ns() - cpu_begun
            latencies.append(now - begun - arrival)
            if now - begun > _GIVE_UP_AFTER * max(duration_ns, bound_ns):
                gave_up = number + 1 < len(arrivals)
                break
    except KeyboardInterrupt:
        is_interrupted = True
    p99 = percentile(latencies, 99) if latencies else 0.0
    timed = Timed(1, latencies, now - begun, cpu_ns, is_interrupted)
    return Trial(rate_per_s, bound_ns, timed, p99, gave_up)


def find_rate(trial: Callable[[float, bool], Trial], capacity_per_s: float, tick: Tick) -> Found:
    """Find the highest rate that holds its bound.

    Args:
        trial: tries a rate per second; with True, with other random numbers than the search uses.
        capacity_per_s: how many queries one after another make a second; no rate above it is tried.
        tick: hears how far the search is.

    An interrupt ends it: the trials until then are returned, with the one that it hit, if any.
    """
    trials: list[Trial] = []

    def tried(rate_per_s: float, confirming: bool) -> Trial:
        trials.append(trial(rate_per_s, confirming))
        tick(min(1.0, len(trials) / TRIALS_AT_MOST))
        if trials[-1].timed.is_interrupted:
            raise KeyboardInterrupt
        return trials[-1]

    try:
        return Found(_search(tried, capacity_per_s), tuple(trials), False)
    except KeyboardInterrupt:
        return Found(None, tuple(trials), True)


def _search(tried: Callable[[float, bool], Trial], capacity_per_s: float) -> Trial | None:
    """The trial that confirmed the highest rate; None if none held."""
    low, high = 0.0, capacity_per_s
    for _ in range(HALVINGS):
        rate = (low + high) / 2
        holds = tried(rate, False).holds or tried(rate, False).holds
        low, high = (rate, high) if holds else (low, rate)
    for step in range(CONFIRMATIONS if low > 0 else 0):
        found = tried(low * BACK_OFF**step, True)
        if found.holds:
            return found
    return None

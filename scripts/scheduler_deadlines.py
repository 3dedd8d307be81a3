"""The highest rate of random arrivals that a scheduler holds, and what deadlines do below and above it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scheduler_load import OpenRun, Stream, Submit, poisson_arrivals, send

__all__ = ["DEADLINE_MS", "OpenLoop", "find_capacity", "holds", "measure_open_loop"]

DEADLINE_MS = 20.0
STEADY = 0.8
OVERLOAD = 3.0
HELD_SHARE = 0.99
HELD_GRACE_S = 0.02
_HALVINGS = 6
_BACK_OFF = 0.95
_CONFIRMATIONS = 25
_PERCENTS = (50, 99, 99.9, 100)


@dataclass(frozen=True)
class OpenLoop:
    """What one repetition found.

    Attributes:
        precision: of the model.
        repetition: which one.
        capacity_per_s: the highest rate held.
        steady_in_time: of the requests let in at 80 % of it, the share answered within 20 ms of their planned arrival.
        steady_refused: of those planned, the share that was refused.
        steady_hopeless: of those planned, the share that the generator came to too late to send.
        steady_expired: of those let in, the share that ended with an error.
        steady_latency_ms: p50, p99, p99.9 and the largest latency from planned arrival.
        steady_behind_ms: the same of how late the generator was.
        overload_sent: at 300 %, the rate that the generator reached over the capacity.
        overload_goodput: answers within 20 ms of submission per second over the capacity.
        refused_ms: p50, p99, p99.9 and the largest time until a refused request was told.
        generator_cpus: CPUs that the generator's thread took at 80 % and at 300 %.
        other_cpus: CPUs that other processes took meanwhile.
    """

    precision: str
    repetition: int
    capacity_per_s: float
    steady_in_time: float
    steady_refused: float
    steady_hopeless: float
    steady_expired: float
    steady_latency_ms: list[float]
    steady_behind_ms: list[float]
    overload_sent: float
    overload_goodput: float
    refused_ms: list[float]
    generator_cpus: tuple[float, float]
    other_cpus: tuple[float, float]


def measure_open_loop(
    submit: Submit,
    stream: Stream,
    *,
    precision: str,
    repetition: int,
    highest_per_s: float,
    seconds: float,
) -> OpenLoop:
    """Find the capacity, then run at 80 % and at 300 % of it with deadlines.

    Args:
        highest_per_s: no rate above it is tried.
        seconds: of each run of the search; the two runs with deadlines take three times as long.
    """
    seeds = iter(range(1000 * repetition, 1000 * (repetition + 1)))

    def run(rate_per_s: float, *, confirming: bool) -> OpenRun:
        length = 2 * seconds if confirming else seconds
        return send(submit, stream, poisson_arrivals(rate_per_s, length, next(seeds)), deadline_ms=None)

    capacity = find_capacity(lambda rate, confirming: holds(run(rate, confirming=confirming)), highest_per_s)
    steady = send(
        submit,
        stream,
        poisson_arrivals(STEADY * capacity, 3 * seconds, next(seeds)),
        deadline_ms=DEADLINE_MS,
    )
    overload = send(
        submit,
        stream,
        poisson_arrivals(OVERLOAD * capacity, 3 * seconds, next(seeds)),
        deadline_ms=DEADLINE_MS,
        from_arrival=False,
    )
    planned = len(steady.arrivals.times_ns)
    per_s = overload.arrivals.duration_s * capacity
    return OpenLoop(
        precision=precision,
        repetition=repetition,
        capacity_per_s=capacity,
        steady_in_time=steady.in_time(DEADLINE_MS) / max(1, steady.admitted),
        steady_refused=len(steady.refused_ns) / planned,
        steady_hopeless=steady.hopeless / planned,
        steady_expired=len(steady.errors) / max(1, steady.admitted),
        steady_latency_ms=_percentiles_ms(steady.latencies_ns),
        steady_behind_ms=_percentiles_ms(steady.behind_ns),
        overload_sent=overload.sent / per_s,
        overload_goodput=overload.in_time_from_submission(DEADLINE_MS) / per_s,
        refused_ms=_percentiles_ms(overload.refused_ns),
        generator_cpus=(steady.generator_cpus, overload.generator_cpus),
        other_cpus=(steady.other_cpus, overload.other_cpus),
    )


def holds(run: OpenRun) -> bool:
    """Whether a rate was kept up with: 99 % of what was planned answered by 20 ms after the last arrival's time."""
    return run.share_answered_by_end(HELD_GRACE_S) >= HELD_SHARE


def find_capacity(held: Callable[[float, bool], bool], highest_per_s: float) -> float:
    """The highest rate that is held, by halving; then confirmed, and lowered by 5 % where it is not.

    Args:
        held: tries a rate; with True, for longer.
        highest_per_s: no rate above it is tried.
    """
    low, high = 0.0, highest_per_s
    for _ in range(_HALVINGS):
        rate = (low + high) / 2
        low, high = (rate, high) if held(rate, False) or held(rate, False) else (low, rate)
    rate = low
    for _ in range(_CONFIRMATIONS):
        if rate > 0 and held(rate, True):
            return rate
        rate *= _BACK_OFF
    raise SystemExit(
        f"no rate up to {highest_per_s:.0f} requests/s was held: the machine is too busy to measure"
    )


def _percentiles_ms(values_ns: object) -> list[float]:
    values = np.asarray(values_ns, dtype=np.float64)
    return [float(value) for value in np.percentile(values, _PERCENTS) / 1e6] if len(values) else []

"""How long graphs take beside each other, on this machine and with one thread.

Sessions take turns in every round, in an order that moves on by one each time, and are compared within the
round: what slows the machine down for a while slows all of them. A turn is one call to bring a graph's weights
back into the caches and one that is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from te_export.models.input_rows import InputRows
from te_runtime.session_types import Session

__all__ = ["BATCH_SIZES", "Feeds", "LatencyRatio", "latency_feeds", "measure_ratios"]

BATCH_SIZES = (1, 8, 64)
Feeds = Mapping[str, NDArray[np.generic]]
"""Arrays by input name, as Session.run takes them."""

_MOST_ROUNDS = 500


@dataclass(frozen=True)
class LatencyRatio:
    """One session at one batch size, against the first session.

    Attributes:
        name: of the session.
        batch: rows per call.
        ratio: median over rounds of its latency over the first session's in the same round; below 1 is faster.
        low, high: the 10th and the 90th percentile of the same.
        latency_us: its median latency in microseconds.
        latency_low_us, latency_high_us: the 10th and the 90th percentile of the same.
        rounds: how many were timed.
    """

    name: str
    batch: int
    ratio: float
    low: float
    high: float
    latency_us: float
    latency_low_us: float
    latency_high_us: float
    rounds: int


def latency_feeds(names: Sequence[str], x: InputRows) -> dict[int, Feeds]:
    """Feeds of the inputs `names` for every batch size, from rows that are repeated where they are too few."""
    return {batch: x[np.arange(batch) % len(x)].feeds(names) for batch in BATCH_SIZES}


def measure_ratios(
    sessions: Mapping[str, Session],
    feeds: Mapping[int, Feeds],
    *,
    seconds: float = 2.0,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> tuple[LatencyRatio, ...]:
    """Time sessions against the first of them.

    Args:
        sessions: at least one, by name, opened with threads=1. All read the same inputs.
        feeds: what to run them on, by batch size.
        seconds: about the longest that one batch size may take. One round is timed even if it takes longer.
        clock_ns: tells the time in nanoseconds.

    Returns:
        For every batch size, in order, an entry for every session, in order; that of the first has ratio 1.

    Raises:
        ValueError: there are no sessions.
        BundleError: a graph failed while it ran.
    """
    if not sessions:
        raise ValueError("no sessions: pass at least the one that the others are compared with")
    found: list[LatencyRatio] = []
    for batch, feed in feeds.items():
        latencies = _time_rounds(list(sessions.values()), feed, round(seconds * 1e9), clock_ns)
        ratios = latencies / latencies[:, :1]
        found += [
            _summarize(name, batch, latencies[:, column], ratios[:, column])
            for column, name in enumerate(sessions)
        ]
    return tuple(found)


def _summarize(
    name: str, batch: int, latencies: NDArray[np.float64], ratios: NDArray[np.float64]
) -> LatencyRatio:
    low, ratio, high = np.percentile(ratios, (10, 50, 90)).tolist()
    fastest, middle, slowest = (np.percentile(latencies, (10, 50, 90)) / 1e3).tolist()
    return LatencyRatio(
        name=name,
        batch=batch,
        ratio=ratio,
        low=low,
        high=high,
        latency_us=middle,
        latency_low_us=fastest,
        latency_high_us=slowest,
        rounds=len(latencies),
    )


def _time_rounds(
    sessions: list[Session], feed: Feeds, limit_ns: int, clock_ns: Callable[[], int]
) -> NDArray[np.float64]:
    """Latencies (rounds, sessions) in nanoseconds, of as many rounds as fit the limit."""
    rounds: list[list[float]] = []
    begun = now = clock_ns()
    last_ns = 0
    while not rounds or (len(rounds) < _MOST_ROUNDS and now - begun + last_ns <= limit_ns):
        rounds.append(_time_round(sessions, feed, len(rounds) % len(sessions), clock_ns))
        last_ns, now = clock_ns() - now, clock_ns()
    return np.array(rounds, dtype=np.float64)


def _time_round(sessions: list[Session], feed: Feeds, first: int, clock_ns: Callable[[], int]) -> list[float]:
    latencies = [0.0] * len(sessions)
    for turn in range(len(sessions)):
        index = (first + turn) % len(sessions)
        sessions[index].run(feed)
        begun = clock_ns()
        sessions[index].run(feed)
        latencies[index] = max(1, clock_ns() - begun)  # a coarse clock may not have moved
    return latencies

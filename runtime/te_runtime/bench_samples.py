"""What samples of a benchmark say: percentiles, and how steady the run was. Ratios of pairs are in bench_ratio.

A percentile is by nearest rank: the smallest sample that at least p % of the samples do not exceed. So it is a
latency that was really seen, and p99 of fewer than 100 samples is the slowest of them.

A run is cut into five parts of equally many calls, in the order they were made. Where the medians of the parts lie
more than 5 % of their median apart, the run is noisy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "NOISY_ABOVE",
    "PARTS",
    "Latency",
    "Spread",
    "SpreadState",
    "percentile",
    "spread_of_parts",
    "summarize",
]

PARTS = 5
NOISY_ABOVE = 0.05
SAMPLES_FOR_P999 = 1000
_SAMPLES_PER_PART = 5

SpreadState = Literal["steady", "noisy", "too few"]


@dataclass(frozen=True)
class Latency:
    """Percentiles of latencies.

    Attributes:
        count: how many samples.
        p50_ns, p90_ns, p99_ns: in nanoseconds.
        p999_ns: p99.9; None for fewer than 1,000 samples, of which it would only be the slowest.
        mean_ns, min_ns, max_ns: of all samples.
    """

    count: int
    p50_ns: float
    p90_ns: float
    p99_ns: float
    p999_ns: float | None
    mean_ns: float
    min_ns: float
    max_ns: float


@dataclass(frozen=True)
class Spread:
    """How far the parts of a run differ.

    Attributes:
        medians_ns: of each part, in order.
        apart: largest minus smallest of them over their median.
        state: `noisy` if `apart` is above 0.05; `too few` if a part has fewer than 5 samples.
    """

    medians_ns: tuple[float, ...]
    apart: float
    state: SpreadState


def percentile(samples: Sequence[float] | NDArray[np.float64], percent: float) -> float:
    """The nearest-rank percentile of samples, at least one, in any order."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    rank = math.ceil(round(percent / 100 * len(ordered), 9))  # 99.9 % of 1,000 is 999, not 999.0000000000001
    return float(ordered[max(0, rank - 1)])


def summarize(latencies_ns: Sequence[int]) -> Latency:
    """Percentiles of latencies, at least one, in nanoseconds."""
    samples = np.sort(np.asarray(latencies_ns, dtype=np.float64))
    p50, p90, p99 = (percentile(samples, percent) for percent in (50, 90, 99))
    return Latency(
        count=len(samples),
        p50_ns=p50,
        p90_ns=p90,
        p99_ns=p99,
        p999_ns=percentile(samples, 99.9) if len(samples) >= SAMPLES_FOR_P999 else None,
        mean_ns=float(samples.mean()),
        min_ns=float(samples[0]),
        max_ns=float(samples[-1]),
    )


def spread_of_parts(latencies_ns: Sequence[int]) -> Spread:
    """Cut latencies, at least one, in the order of the calls, into parts, and compare their medians."""
    samples = np.asarray(latencies_ns, dtype=np.float64)
    parts = np.array_split(samples, min(PARTS, len(samples)))
    medians = [float(np.median(part)) for part in parts]
    middle = float(np.median(medians))
    apart = (max(medians) - min(medians)) / middle if middle > 0 else 0.0
    state: SpreadState = "noisy" if apart > NOISY_ABOVE else "steady"
    if len(samples) < PARTS * _SAMPLES_PER_PART:
        state = "too few"
    return Spread(tuple(medians), apart, state)

"""What samples of a benchmark say: percentiles, how steady the run was, and ratios of pairs.

A percentile is by nearest rank: the smallest sample that at least p % of the samples do not exceed. So it is a
latency that was really seen, and p99 of fewer than 100 samples is the slowest of them.

A run is cut into five parts of equally many calls, in the order they were made. Where the medians of the parts lie
more than 5 % of their median apart, the run is noisy.

The median of the ratios of pairs comes with a 95 % confidence interval from ranks n/2 ± 0.98 √n, which asks nothing of
the distribution but pairs that do not depend on each other. A ratio is noisy where that interval spans more than 5 %, or
where the halves of the run, which a slow drift tells apart, differ by more than 5 %.
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
    "PairRatio",
    "Spread",
    "SpreadState",
    "compare_pairs",
    "percentile",
    "spread_of_parts",
    "summarize",
]

PARTS = 5
NOISY_ABOVE = 0.05
SAMPLES_FOR_P999 = 1000
_SAMPLES_PER_PART = 5
_PAIRS_WANTED = 20

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


@dataclass(frozen=True)
class PairRatio:
    """Pairs of calls, each one's latency over the other's.

    Attributes:
        pairs: how many.
        median: of the ratios of all pairs.
        low, high: their 10th and 90th percentile.
        sure_low, sure_high: the 95 % confidence interval of the median.
        first_half, second_half: the median of the ratios in each half of the run.
        halves_apart: how much the larger of these exceeds the smaller, as a part of it.
        state: `noisy` if that or `sure_within` is above 0.05; `too few` for fewer than 20 pairs.
    """

    pairs: int
    median: float
    low: float
    high: float
    sure_low: float
    sure_high: float
    first_half: float
    second_half: float
    halves_apart: float
    state: SpreadState

    @property
    def sure_within(self) -> float:
        """How much `sure_high` exceeds `sure_low`, as a part of it."""
        return self.sure_high / self.sure_low - 1


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


def compare_pairs(over_ns: Sequence[int], under_ns: Sequence[int]) -> PairRatio:
    """Divide the first latency of every pair, at least one, by the second.

    Args:
        over_ns: latencies in nanoseconds, in the order of the pairs.
        under_ns: the other one's, as many.
    """
    under = np.maximum(np.asarray(under_ns, dtype=np.float64), 1)  # a coarse clock may not have moved
    ratios = np.maximum(np.asarray(over_ns, dtype=np.float64), 1) / under
    low, median, high = np.percentile(ratios, (10, 50, 90)).tolist()
    sure_low, sure_high = _median_interval(ratios)
    middle = max(1, len(ratios) // 2)
    first = float(np.median(ratios[:middle]))
    second = float(np.median(ratios[middle:])) if len(ratios) > 1 else first
    apart = max(first, second) / min(first, second) - 1
    state: SpreadState = "noisy" if max(apart, sure_high / sure_low - 1) > NOISY_ABOVE else "steady"
    if len(ratios) < _PAIRS_WANTED:
        state = "too few"
    return PairRatio(
        len(ratios), median, low, high, sure_low, sure_high, first, second, halves_apart=apart, state=state
    )


def _median_interval(samples: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % confidence interval of the median, from the normal approximation of the binomial ranks."""
    ordered, count = np.sort(samples), len(samples)
    reach = 1.96 * math.sqrt(count) / 2
    lowest = max(0, math.floor(count / 2 - reach))
    highest = min(count - 1, math.ceil(count / 2 + reach))
    return float(ordered[lowest]), float(ordered[highest])

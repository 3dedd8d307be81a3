"""The ratio of two models that took turns: their latencies divided pair by pair, and how far that can be believed.

The run is cut into ten parts of equally many pairs, in the order they were made, and each has a median ratio. What
drifts while the run lasts moves these apart; what is only chance from pair to pair does not, where there are many pairs.

The median of all pairs comes with a 95 % confidence interval, the wider of two at each end. One is from ranks
n/2 ± 0.98 √n, which asks nothing of the distribution but pairs that do not depend on each other. The other is Student's
t of the ten medians (batch means), which stays true where neighbouring pairs do.

A ratio is noisy where that interval spans more than 5 %, or where the medians of its parts lie more than 5 % apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from te_runtime.bench_samples import NOISY_ABOVE, SpreadState

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["RATIO_PARTS", "PairRatio", "compare_pairs"]

RATIO_PARTS = 10
_STUDENT_T = 2.262  # 97.5 % quantile for 9 degrees of freedom, one less than RATIO_PARTS
_PAIRS_WANTED = 2 * RATIO_PARTS


@dataclass(frozen=True)
class PairRatio:
    """Pairs of calls, each one's latency over the other's.

    Attributes:
        pairs: how many.
        median: of the ratios of all pairs.
        low, high: their 10th and 90th percentile.
        sure_low, sure_high: the 95 % confidence interval of the median.
        parts: the median of the ratios in each tenth of the run, in order; fewer where there are fewer pairs.
        state: `noisy` if `parts_apart` or `sure_within` is above 0.05; `too few` for fewer than 20 pairs.
    """

    pairs: int
    median: float
    low: float
    high: float
    sure_low: float
    sure_high: float
    parts: tuple[float, ...]

    @property
    def sure_within(self) -> float:
        """How much `sure_high` exceeds `sure_low`, as a part of it."""
        return self.sure_high / self.sure_low - 1

    @property
    def parts_apart(self) -> float:
        """How much the largest of the parts exceeds the smallest, as a part of it."""
        return max(self.parts) / min(self.parts) - 1

    @property
    def state(self) -> SpreadState:
        """Whether another run on the same machine can be expected to agree."""
        if self.pairs < _PAIRS_WANTED:
            return "too few"
        return "noisy" if max(self.parts_apart, self.sure_within) > NOISY_ABOVE else "steady"

    @property
    def is_told_from_one(self) -> bool:
        """Whether neither chance nor drift of the machine can have made the two differ."""
        is_within_chance = self.sure_low <= 1 <= self.sure_high
        return self.state != "too few" and not is_within_chance and abs(self.median - 1) > self.parts_apart


def compare_pairs(over_ns: Sequence[int], under_ns: Sequence[int]) -> PairRatio:
    """Divide the first latency of every pair, at least one, by the second.

    Args:
        over_ns: latencies in nanoseconds, in the order of the pairs.
        under_ns: the other one's, as many.
    """
    under = np.maximum(np.asarray(under_ns, dtype=np.float64), 1)  # a coarse clock may not have moved
    ratios = np.maximum(np.asarray(over_ns, dtype=np.float64), 1) / under
    low, median, high = np.percentile(ratios, (10, 50, 90)).tolist()
    tenths = np.array_split(ratios, min(RATIO_PARTS, len(ratios)))
    parts = tuple(float(np.median(part)) for part in tenths)
    sure_low, sure_high = _rank_interval(ratios)
    if len(parts) == RATIO_PARTS:
        reach = _parts_reach(parts)
        sure_low, sure_high = min(sure_low, median / reach), max(sure_high, median * reach)
    return PairRatio(len(ratios), median, low, high, sure_low, sure_high, parts)


def _rank_interval(samples: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % confidence interval of the median, from the normal approximation of the binomial ranks."""
    ordered, count = np.sort(samples), len(samples)
    reach = 1.96 * math.sqrt(count) / 2
    lowest = max(0, math.floor(count / 2 - reach))
    highest = min(count - 1, math.ceil(count / 2 + reach))
    return float(ordered[lowest]), float(ordered[highest])


def _parts_reach(parts: Sequence[float]) -> float:
    """The factor by which Student's t interval of the parts reaches up and down, from their logarithms."""
    error = float(np.log(parts).std(ddof=1)) / math.sqrt(len(parts))
    return math.exp(_STUDENT_T * error)

"""What a comparison found, and what it may be summed up as."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sharing_models import Family, Size

CONFIDENCE = 0.95

Routing = Sequence[Sequence[float]]
"""(T, K): the mean routing weight that each task gives each expert."""


@dataclass(frozen=True)
class Run:
    """One model, trained and judged once.

    Attributes:
        scores: after each number of steps and per task, accuracy or R² on the held-out rows.
        training_cpu_s: processor time of all training steps, one thread.
        routing: over the held-out rows, after the last step; None for a family without gates.
    """

    family: Family
    seed: int
    scores: Mapping[int, Mapping[str, float]]
    training_cpu_s: float
    routing: Routing | None


@dataclass(frozen=True)
class Reference:
    """Scores per task of a model without any network, on the same rows."""

    name: str
    seed: int
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Latency:
    """Calls of one graph, which gives all tasks, at one batch size.

    Attributes:
        calls: how many were timed.
        round_medians_us: of each turn that the graph had.
    """

    graph: str
    batch: int
    calls: int
    median_us: float
    p10_us: float
    p90_us: float
    round_medians_us: Sequence[float]


@dataclass(frozen=True)
class Comparison:
    """Everything found on one table.

    Attributes:
        measures: `accuracy` or `R²`, per task.
    """

    table: str
    inputs: int
    training_rows: int
    held_out_rows: int
    measures: Mapping[str, str]
    sizes: Sequence[Size]
    runs: Sequence[Run]
    references: Sequence[Reference]
    latencies: Sequence[Latency]

    @property
    def judged_after(self) -> list[int]:
        """Numbers of steps."""
        return list(self.runs[0].scores)

    def scores(self, family: Family, task: str, steps: int) -> list[float]:
        """In the order of seeds."""
        return [run.scores[steps][task] for run in self.runs if run.family == family]

    def differences(self, family: Family, task: str, steps: int, *, over: Family) -> list[float]:
        """Of each seed, one family's score less the other's."""
        pairs = zip(self.scores(family, task, steps), self.scores(over, task, steps), strict=True)
        return [score - other for score, other in pairs]


@dataclass(frozen=True)
class Interval:
    """A mean and what lies to both sides of it."""

    mean: float
    half_width: float

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half_width


def resampled_t_interval(differences: Sequence[float], *, held_out_share: float) -> Interval:
    """Student's t interval of a mean over splits of the same rows (Nadeau and Bengio 2003).

    Splits drawn anew from one table share rows, so their differences are not independent: the variance of the
    mean is taken as (1 / n + held-out rows / training rows) · s² instead of s² / n.

    Args:
        differences: one per split.
        held_out_share: held-out rows over all rows.
    """
    count = len(differences)
    if count < 2:
        return Interval(float(np.mean(differences)), math.nan)
    factor = 1 / count + held_out_share / (1 - held_out_share)
    spread = float(np.std(differences, ddof=1)) * math.sqrt(factor)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Interval(float(np.mean(differences)), quantile * spread)


def sample_deviation(values: Sequence[float]) -> float:
    """NaN where there is one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

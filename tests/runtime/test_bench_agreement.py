"""Two runs that are both called steady agree: simulated on one machine whose ratio is noisy and drifts.

The noise is of one pair of calls; the drift moves the ratio of all pairs for a while, as another process that takes
some cache does. Drift is an Ornstein-Uhlenbeck process, or a machine that jumps between two states. Its correlation time
is at most three tenths of a run: what changes more slowly is seen by neither of two runs, and no rule over
one run can tell it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest

from te_runtime.bench_ratio import PairRatio, compare_pairs
from te_runtime.bench_scenarios import measure_pairs

MS = 1_000_000
PAIRS = 100  # in a run whose ratio is 1; others have a few more or fewer in the same time
STEPS = 2 * PAIRS
CASES_PER_MACHINE = 15
TOLERANCE = 0.05


class Machine(NamedTuple):
    """How a ratio's logarithm moves: standard deviation per pair, size of the drift, its correlation time in runs."""

    noise: float
    drift: float
    memory: float
    jumps: bool

    def log_ratios(self, rng: np.random.Generator) -> np.ndarray:
        return self.noise * rng.normal(size=STEPS) + self.drift * self._drift(rng)

    def _drift(self, rng: np.random.Generator) -> np.ndarray:
        if self.jumps:
            switches = rng.random(STEPS) < 1 / (PAIRS * self.memory)
            return np.where((np.cumsum(switches) + rng.integers(2)) % 2 == 1, 1.0, -1.0)
        kept = math.exp(-1 / (PAIRS * self.memory))
        states = [rng.normal()]
        for step in rng.normal(size=STEPS - 1):
            states.append(kept * states[-1] + math.sqrt(1 - kept**2) * step)
        return np.array(states)


MACHINES = [
    Machine(noise, drift, memory, jumps)
    for noise in (0.01, 0.05)
    for drift in (0.01, 0.02, 0.03, 0.05)
    for memory in (0.02, 0.1, 0.3)
    for jumps in (False, True)
]


def run(fakes: ModuleType, machine: Machine, rng: np.random.Generator) -> PairRatio:
    """One run of `te-runtime bench --compare` on the machine, by a clock that only its calls move."""
    clock = fakes.FakeClock()
    times = np.exp(machine.log_ratios(rng)) * MS

    def first() -> Iterator[int]:
        for time_ns in times:
            yield from (int(time_ns), int(time_ns))  # the call that is not timed, and the one that is

    calls = clock.calls(first()), clock.calls(repeat(MS))
    duration_ns = 4 * PAIRS * MS
    over, under = measure_pairs(
        calls, clock, rows_per_call=1, duration_ns=duration_ns, tick=lambda _part: None
    )
    return compare_pairs(over.latencies_ns, under.latencies_ns)


def disagree(first: PairRatio, second: PairRatio) -> bool:
    return max(first.median, second.median) / min(first.median, second.median) - 1 > TOLERANCE


@pytest.fixture(scope="module")
def simulated(bench_fakes: ModuleType) -> list[tuple[PairRatio, PairRatio]]:
    rng = np.random.default_rng(7)
    return [
        (run(bench_fakes, machine, rng), run(bench_fakes, machine, rng))
        for machine in MACHINES
        for _ in range(CASES_PER_MACHINE)
    ]


def test_two_steady_runs_disagree_by_more_than_5_percent_in_at_most_1_percent_of_cases(
    simulated: list[tuple[PairRatio, PairRatio]],
) -> None:
    steady = [pair for pair in simulated if all(ratio.state == "steady" for ratio in pair)]
    assert len(steady) > len(simulated) / 5  # a rule that calls everything noisy would agree too
    assert sum(disagree(*pair) for pair in simulated) > len(simulated) / 20  # there is something to tell
    assert sum(disagree(*pair) for pair in steady) <= 0.01 * len(steady)

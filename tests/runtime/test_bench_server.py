from __future__ import annotations

from itertools import chain, repeat
from types import ModuleType

import numpy as np
import pytest

from te_runtime.bench_scenarios import Timed
from te_runtime.bench_server import Trial, find_rate, poisson_arrivals_ns, run_trial

MS = 1_000_000
S = 1000 * MS


def ignore(_part: float) -> None:
    pass


def test_arrivals_are_a_poisson_process() -> None:
    arrivals = np.array(poisson_arrivals_ns(1000, 20 * S, seed=3))
    gaps = np.diff(arrivals) / MS
    assert len(arrivals) == pytest.approx(20_000, rel=0.03)
    assert gaps.mean() == pytest.approx(1, rel=0.03)
    assert gaps.std() == pytest.approx(1, rel=0.05)  # as wide as it is long, unlike a regular beat
    assert (gaps >= 0).all()
    assert arrivals[-1] < 20 * S


def test_arrivals_depend_on_the_seed_alone() -> None:
    assert poisson_arrivals_ns(50, S, seed=1) == poisson_arrivals_ns(50, S, seed=1)
    assert poisson_arrivals_ns(50, S, seed=1) != poisson_arrivals_ns(50, S, seed=2)


def test_a_higher_rate_brings_the_same_gaps_closer() -> None:
    slow, fast = poisson_arrivals_ns(100, 2 * S, seed=1), poisson_arrivals_ns(200, S, seed=1)
    assert len(slow) == len(fast)
    np.testing.assert_allclose(slow, np.array(fast) * 2, atol=2)


def test_latency_counts_from_arrival(bench_fakes: ModuleType) -> None:
    """One answer of 500 ms makes all that arrive meanwhile wait, and their latency tells."""
    clock = bench_fakes.FakeClock()
    call = clock.calls(chain([500 * MS], repeat(MS // 100)))
    trial = run_trial(call, clock, rate_per_s=100, bound_ns=S, duration_ns=S, seed=0)
    arrivals = np.array(poisson_arrivals_ns(100, S, seed=0))
    waited = arrivals < 500 * MS
    latencies = np.array(trial.timed.latencies_ns)
    assert waited.sum() > 30
    np.testing.assert_allclose(latencies[waited], 500 * MS - arrivals[waited], atol=MS)
    assert latencies[~waited].max() < MS
    assert trial.timed.cpu_ns == pytest.approx(250 * MS, rel=0.01)
    assert trial.p99_ns > 490 * MS


def test_queries_are_not_asked_before_they_arrive(bench_fakes: ModuleType) -> None:
    clock = bench_fakes.FakeClock()
    run_trial(clock.calls(repeat(MS)), clock, rate_per_s=10, bound_ns=S, duration_ns=S, seed=0)
    assert [wait - 7 * MS for wait in clock.waits] == list(poisson_arrivals_ns(10, S, seed=0))


def test_a_hopeless_rate_is_given_up(bench_fakes: ModuleType) -> None:
    clock = bench_fakes.FakeClock()
    trial = run_trial(
        clock.calls(repeat(50 * MS)), clock, rate_per_s=100, bound_ns=10 * S, duration_ns=10 * S, seed=0
    )
    assert trial.gave_up
    assert not trial.holds
    assert trial.timed.wall_ns < 21 * S


def test_an_interrupted_trial_does_not_hold(bench_fakes: ModuleType) -> None:
    clock = bench_fakes.FakeClock()
    trial = run_trial(
        clock.calls(iter([MS, MS, -1])), clock, rate_per_s=100, bound_ns=S, duration_ns=S, seed=0
    )
    assert len(trial.timed.latencies_ns) == 2
    assert not trial.holds


def trial_of(rate: float, *, holds: bool, interrupted: bool = False) -> Trial:
    timed = Timed(1, [1] * 10, 10, 5, interrupted)
    return Trial(rate, 10, timed, 1.0 if holds else 100.0, gave_up=False)


def test_the_search_finds_the_highest_rate_and_confirms_it() -> None:
    asked: list[tuple[float, bool]] = []

    def trial(rate: float, confirming: bool) -> Trial:
        asked.append((rate, confirming))
        return trial_of(rate, holds=rate <= 700)

    found = find_rate(trial, 1000, ignore)
    assert found.best is not None
    assert 700 - 1000 / 64 <= found.best.rate_per_s <= 700
    assert [confirming for _, confirming in asked].count(True) == 1
    assert max(rate for rate, _ in asked) < 1000


def test_one_hiccup_does_not_decide_the_search() -> None:
    outcomes = chain([False], repeat(True))
    found = find_rate(lambda rate, _: trial_of(rate, holds=next(outcomes)), 1000, ignore)
    assert found.best is not None
    assert found.best.rate_per_s > 950


def test_a_rate_that_is_not_confirmed_is_lowered() -> None:
    found = find_rate(
        lambda rate, confirming: trial_of(rate, holds=rate <= (500 if confirming else 700)), 1000, ignore
    )
    assert found.best is not None
    assert 400 < found.best.rate_per_s <= 500


def test_nothing_holds() -> None:
    found = find_rate(lambda rate, _: trial_of(rate, holds=False), 1000, ignore)
    assert (found.best, found.is_interrupted) == (None, False)
    assert len(found.trials) == 12


@pytest.mark.parametrize("confirming", [False, True])
def test_an_interrupt_ends_the_search(confirming: bool) -> None:
    found = find_rate(
        lambda rate, now: trial_of(rate, holds=True, interrupted=now is confirming), 1000, ignore
    )
    assert (found.best, found.is_interrupted) == (None, True)
    assert found.trials[-1].timed.is_interrupted

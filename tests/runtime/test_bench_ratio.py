from __future__ import annotations

import math

import numpy as np
import pytest

from te_runtime.bench_ratio import compare_pairs

ONE = 10**6


def ns(ratios: object) -> list[int]:
    """Latencies that have these ratios to ONE."""
    return (np.asarray(ratios) * ONE).astype(int).tolist()


def test_ratios_are_taken_pair_by_pair() -> None:
    """A machine that slows down fourfold half way moves both latencies, and no ratio."""
    under = np.repeat([100, 400], 50)
    found = compare_pairs((under * 2).tolist(), under.tolist())
    assert (found.median, found.low, found.high, found.pairs) == (2, 2, 2, 100)
    assert (found.sure_low, found.sure_high, found.parts, found.state) == (2, 2, (2.0,) * 10, "steady")


@pytest.mark.parametrize(("last", "state"), [(1.04, "steady"), (1.06, "noisy")])
def test_one_part_that_differs_by_more_than_5_percent_is_noise(last: float, state: str) -> None:
    found = compare_pairs(ns([1.0] * 180 + [last] * 20), [ONE] * 200)
    assert found.parts_apart == pytest.approx(last - 1)
    assert (len(found.parts), found.parts[-1], found.state) == (10, pytest.approx(last), state)


def test_parts_that_agree_by_chance_are_noisy_too() -> None:
    part = np.random.default_rng(0).lognormal(sigma=1, size=20)
    found = compare_pairs(ns(np.tile(part, 10)), [ONE] * 200)
    assert found.parts_apart == 0
    assert found.sure_within > 0.05
    assert found.state == "noisy"


def test_parts_that_drift_widen_the_interval() -> None:
    """Ranks alone take the pairs of a part for independent ones, and would be sure within nothing."""
    found = compare_pairs(ns(np.repeat([1.0, 1.02], [120, 80])), [ONE] * 200)
    logs = np.log(found.parts)
    reach = math.exp(2.262 * logs.std(ddof=1) / math.sqrt(10))
    assert (found.sure_low, found.sure_high) == (pytest.approx(1 / reach), pytest.approx(reach))


@pytest.mark.parametrize("neighbours_alike", [1, 10])
def test_the_interval_holds_the_true_median_19_times_of_20(neighbours_alike: int) -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        ratios = np.repeat(rng.lognormal(sigma=0.3, size=400 // neighbours_alike), neighbours_alike)
        found = compare_pairs(ns(ratios), [ONE] * 400)
        held += found.sure_low <= 1 <= found.sure_high
    assert 0.93 <= held / 400 <= 0.995


def test_which_is_faster_is_told_from_chance_and_drift() -> None:
    assert compare_pairs(ns([0.9] * 100), [ONE] * 100).is_told_from_one
    drifting = compare_pairs(ns(np.repeat([0.88, 0.9, 1.02], [40, 40, 20])), [ONE] * 100)
    assert drifting.sure_high < 1
    assert drifting.parts_apart > 1 - drifting.median
    assert not drifting.is_told_from_one
    assert not compare_pairs(ns(np.tile([0.9, 1.1], 50)), [ONE] * 100).is_told_from_one
    assert not compare_pairs(ns([0.9] * 19), [ONE] * 19).is_told_from_one


def test_few_pairs_say_little() -> None:
    assert compare_pairs([100] * 19, [100] * 19).state == "too few"
    found = compare_pairs([100], [50])
    assert (found.median, found.sure_low, found.sure_high, found.parts) == (2, 2, 2, (2.0,))


def test_a_clock_that_did_not_move_divides_by_nothing() -> None:
    assert compare_pairs([0] * 50, [0] * 50).median == 1

from __future__ import annotations

import numpy as np
import pytest

from te_runtime.bench_samples import compare_pairs, percentile, spread_of_parts, summarize


def test_a_percentile_is_a_sample_by_nearest_rank() -> None:
    samples = list(range(100, 0, -1))
    assert [percentile(samples, percent) for percent in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([7.0], 99) == 7
    assert percentile(list(range(1, 1001)), 99.9) == 999  # and not 1000, by a rounding error


def test_p99_of_fewer_than_a_hundred_is_the_slowest() -> None:
    assert summarize([1] * 98 + [50]).p99_ns == 50


@pytest.mark.parametrize(("count", "expected"), [(999, None), (1000, 998.0)])
def test_p999_needs_a_thousand_samples(count: int, expected: float | None) -> None:
    assert summarize(range(count)).p999_ns == expected


@pytest.mark.parametrize(
    ("medians", "state"), [((100, 100, 104, 101, 100), "steady"), ((100, 100, 106, 101, 100), "noisy")]
)
def test_a_run_is_noisy_when_its_parts_differ_by_more_than_5_percent(
    medians: tuple[int, ...], state: str
) -> None:
    spread = spread_of_parts([value for value in medians for _ in range(10)])
    assert spread.medians_ns == medians
    assert spread.apart == pytest.approx((max(medians) - 100) / 100)
    assert spread.state == state


@pytest.mark.parametrize("count", [1, 4, 24])
def test_a_short_run_is_neither_steady_nor_noisy(count: int) -> None:
    assert spread_of_parts([5] * count).state == "too few"


def test_a_clock_that_did_not_move_divides_by_nothing() -> None:
    assert spread_of_parts([0] * 50).apart == 0
    assert compare_pairs([0] * 50, [0] * 50).median == 1


def test_ratios_are_taken_pair_by_pair() -> None:
    """A machine that slows down fourfold half way moves both latencies, and no ratio."""
    under = np.repeat([100, 400], 50)
    found = compare_pairs((under * 2).tolist(), under.tolist())
    assert (found.median, found.low, found.high, found.pairs) == (2, 2, 2, 100)
    assert (found.sure_low, found.sure_high, found.halves_apart, found.state) == (2, 2, 0, "steady")


def test_halves_that_differ_are_noisy() -> None:
    found = compare_pairs([100] * 50 + [106] * 50, [100] * 100)
    assert found.halves_apart == pytest.approx(0.06)
    assert found.state == "noisy"
    assert compare_pairs([100] * 50 + [104] * 50, [100] * 100).state == "steady"


def test_halves_that_agree_by_chance_are_noisy_too() -> None:
    over = np.random.default_rng(0).lognormal(sigma=1, size=100)
    over = np.concatenate([over, over]) * 1000
    found = compare_pairs(over.astype(int).tolist(), [1000] * 200)
    assert found.halves_apart == 0
    assert found.sure_within > 0.05
    assert found.state == "noisy"


def test_the_interval_holds_the_true_median_19_times_of_20() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        found = compare_pairs((rng.lognormal(sigma=0.3, size=101) * 1e6).astype(int).tolist(), [10**6] * 101)
        held += found.sure_low <= 1 <= found.sure_high
    assert 0.93 <= held / 400 <= 0.99


def test_few_pairs_say_little() -> None:
    assert compare_pairs([100] * 19, [100] * 19).state == "too few"
    assert compare_pairs([100], [50]).median == 2

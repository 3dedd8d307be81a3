from __future__ import annotations

import pytest

from te_runtime.bench_samples import percentile, spread_of_parts, summarize


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

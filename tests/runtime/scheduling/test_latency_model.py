from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from te_runtime.scheduling.latency_model import LatencyModel

TASKS = ("a", "b", "c")


def model(alpha: float = 0.1) -> LatencyModel:
    """Trunk 100 + 10 · rows up to 8, tails 20, 30 and 40."""
    return LatencyModel(
        {rows: 100.0 + 10 * rows for rows in (1, 2, 4, 8)}, {"a": 20.0, "b": 30.0, "c": 40.0}, alpha=alpha
    )


@pytest.mark.parametrize("rows", range(1, 9))
def test_between_knots_the_trunk_is_straight_and_tails_add_up(rows: int) -> None:
    latency = model()
    assert latency.expect({"a"}, rows) == pytest.approx(120 + 10 * rows)
    assert latency.expect(("a", "b", "c"), rows) == pytest.approx(190 + 10 * rows)
    assert latency.expect_about(2, rows) == pytest.approx(160 + 10 * rows)
    assert latency.expect((), rows) == latency.expect_about(0, rows) == pytest.approx(100 + 10 * rows)


@pytest.mark.parametrize("largest", [1, 2, 3, 5, 6, 8, 9, 63, 64, 65])
def test_the_largest_batch_need_not_be_a_power_of_two(largest: int) -> None:
    knots = sorted({1 << power for power in range(8) if 1 << power < largest} | {largest})
    latency = LatencyModel({rows: 7.0 * rows for rows in knots}, {"a": 1.0})
    assert latency.largest_batch == largest
    for rows in range(1, largest + 1):
        assert latency.expect((), rows) == pytest.approx(7.0 * rows)


def test_the_fixed_cost_is_a_pass_of_one_row_without_that_row() -> None:
    assert model().fixed_ns() == pytest.approx(100 + 30)
    assert LatencyModel({1: 50.0}, {"a": 3.0}).fixed_ns() == 0.0
    assert LatencyModel({1: 50.0, 2: 30.0}, {"a": 3.0}).fixed_ns() == pytest.approx(53.0)


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("observed", [10.0, 150.0, 9000.0])
def test_at_a_knot_one_execution_corrects_the_expectation_by_alpha_of_the_error(
    rows: int, observed: float
) -> None:
    """θ ← θ + α · (observed - expected)."""
    latency = model(alpha=0.3)
    before = latency.expect(("a", "c"), rows)
    assert latency.correct(("a", "c"), rows, observed) == pytest.approx(before)
    assert latency.expect(("a", "c"), rows) == pytest.approx(before + 0.3 * (observed - before))


def test_a_part_takes_its_share_of_the_error() -> None:
    latency = model(alpha=1.0)
    latency.correct(("a",), 4, 1.5 * 160)
    assert latency.expect((), 4) == pytest.approx(1.5 * 140)
    assert latency.expect(("a",), 4) == pytest.approx(1.5 * 160)
    assert latency.expect(("b",), 1) == pytest.approx(140), "what did not run is as it was"
    assert latency.expect_about(3, 1) == pytest.approx(110 + 30 + 30 + 40)


@settings(deadline=None, max_examples=100)
@given(
    rows=st.integers(1, 8),
    tasks=st.sets(st.sampled_from(TASKS), min_size=1),
    factor=st.floats(0.05, 20.0),
    alpha=st.floats(0.1, 1.0),
)
def test_it_converges_to_a_step_change_from_one_side(
    rows: int, tasks: set[str], factor: float, alpha: float
) -> None:
    latency = model(alpha)
    truth = factor * latency.expect(tasks, rows)
    error = abs(truth - latency.expect(tasks, rows))
    for _ in range(round(40 / alpha)):
        latency.correct(tasks, rows, truth)
        now = abs(truth - latency.expect(tasks, rows))
        assert now <= error + 1e-9 * truth
        error = now
    assert latency.expect(tasks, rows) == pytest.approx(truth, rel=0.02)
    assert latency.expect_about(1, rows) > 0


@settings(deadline=None, max_examples=100)
@given(
    seen=st.lists(
        st.tuples(
            st.sets(st.sampled_from(TASKS), min_size=1),
            st.integers(1, 8),
            st.sampled_from([0, 1, 200, 10**9]),
        ),
        max_size=60,
    ),
    alpha=st.sampled_from([0.1, 0.9, 1.0]),
)
def test_whatever_is_observed_expectations_stay_positive(
    seen: list[tuple[set[str], int, int]], alpha: float
) -> None:
    latency = model(alpha)
    for tasks, rows, observed in seen:
        latency.correct(tasks, rows, observed)
        assert latency.deviation >= 0
        for size in range(1, 9):
            assert latency.expect(tasks, size) > 0
            assert latency.expect_about(1, size) > 0
        mean = sum(latency.expect((task,), 1) - latency.expect((), 1) for task in TASKS) / 3
        assert latency.expect_about(1, 1) - latency.expect((), 1) == pytest.approx(mean, rel=1e-6, abs=1e-6)


def test_the_deviation_is_a_running_mean_of_the_relative_error() -> None:
    latency = model(alpha=0.5)
    for _ in range(60):
        latency.correct(("a",), 1, latency.expect(("a",), 1) * 1.5)
    assert latency.deviation == pytest.approx(0.5)
    for _ in range(60):
        latency.correct(("a",), 1, latency.expect(("a",), 1))
    assert latency.deviation == pytest.approx(0.0, abs=1e-9)


def test_one_pause_does_not_make_everything_uncertain() -> None:
    latency = model(alpha=0.1)
    latency.correct(("a",), 1, 1000 * latency.expect(("a",), 1))
    assert latency.deviation == pytest.approx(0.1)


def test_what_was_inflated_relaxes_to_its_seed_and_not_below() -> None:
    latency = model()
    for _ in range(20):
        latency.correct(TASKS, 1, 1e7)
    latency.correct(("a",), 8, 1.0)
    low = latency.expect((), 8)
    assert latency.expect(TASKS, 1) > 1e5
    assert low < 180
    for _ in range(200):
        latency.relax()
    assert latency.expect(TASKS, 1) == pytest.approx(200, rel=1e-3)
    assert latency.expect((), 8) == pytest.approx(low), "what is below its seed was measured, and stays"
    assert latency.deviation == pytest.approx(0.0, abs=1e-6)
    assert latency.expect_about(3, 1) == pytest.approx(200, rel=1e-3)


def test_nothing_is_expected_in_no_time() -> None:
    """A tail whose cost is lost in the measurement is seeded with 0 or less."""
    latency = LatencyModel({1: 0.0, 2: -5.0}, {"a": 0.0, "b": -3.0})
    assert latency.expect(("a", "b"), 2) == pytest.approx(3.0)
    assert latency.correct(("a",), 2, 100.0) == pytest.approx(2.0)

from __future__ import annotations

import pytest

from te_runtime.scheduling.batch import Batch
from te_runtime.scheduling.latency_model import LatencyModel
from te_runtime.scheduling.resource_pool import Resource, ResourcePool, ResourceState, first_to_finish


def resource(name: str, latency: float = 100.0, tail: float = 10.0) -> Resource:
    return Resource(name, LatencyModel({1: latency, 2: latency, 4: latency + 40}, {"a": tail, "b": tail}))


def batch() -> Batch:
    return Batch([], frozenset(), 0, 0, 0.0)


def test_a_pool_of_live_executors() -> None:
    one, two = resource("one"), resource("two")
    pool = ResourcePool(iter([one, two]))
    assert pool.resources == pool.live == (one, two)
    assert pool.capacity == 2.0
    assert pool.has_idle
    assert one.is_idle


@pytest.mark.parametrize(
    ("states", "live", "capacity", "elsewhere"),
    [
        (("live", "live", "live"), "012", 3.0, "12"),
        (("suspect", "live", "live"), "12", 3.0, "12"),
        (("suspect", "suspect", "out"), "", 2.0, "1"),
        (("suspect", "stuck", "out"), "", 2.0, "0"),
        (("stuck", "out", "out"), "", 1.0, ""),
        (("stuck", "live", "stuck"), "1", 3.0, "1"),
        (("live", "out", "stuck"), "0", 2.0, "0"),
    ],
)
def test_who_may_run_what(
    states: tuple[ResourceState, ...], live: str, capacity: float, elsewhere: str
) -> None:
    pool = ResourcePool([resource(name) for name in "012"])
    first = pool.resources[0]
    for one, state in zip(pool.resources, states, strict=True):
        pool.change_state(one, state)
    assert "".join(one.name for one in pool.live) == live
    assert pool.capacity == capacity
    assert "".join(one.name for one in pool.elsewhere(first)) == elsewhere
    assert pool.has_other(first) == any(state in ("live", "suspect") for state in states[1:])


def test_only_live_executors_without_a_batch_are_idle() -> None:
    pool = ResourcePool([resource("one"), resource("two")])
    one, two = pool.resources
    one.batch = batch()
    assert not one.is_idle
    assert pool.has_idle
    pool.change_state(two, "suspect", ValueError("x"))
    assert not two.is_idle
    assert not pool.has_idle
    assert isinstance(two.error, ValueError)
    pool.change_state(two, "live")
    assert two.error is None
    assert pool.has_idle


@pytest.mark.parametrize(
    ("free_at", "rows", "expected"),
    [
        ([0.0, 0.0], 1, (0, 120.0)),  # among equals the first
        ([1.0, 0.0], 1, (1, 120.0)),
        ([0.0, 5.0], 4, (0, 160.0)),
        ([200.0, 100.0], 2, (1, 220.0)),
    ],
)
def test_a_batch_goes_where_it_is_finished_first(
    free_at: list[float], rows: int, expected: tuple[int, float]
) -> None:
    assert first_to_finish([resource("one"), resource("two")], free_at, 2, rows) == expected


def test_a_faster_executor_is_worth_waiting_for() -> None:
    both = [resource("slow", 300.0), resource("fast", 100.0)]
    assert first_to_finish(both, [0.0, 199.0], 1, 1) == (1, 309.0)
    assert first_to_finish(both, [0.0, 201.0], 1, 1) == (0, 310.0)


def test_an_overdue_executor_is_expected_later_and_later() -> None:
    one = resource("one")
    one.free_at_ns = 50
    assert one.free_from_ns(1000) == 1000, "it has nothing to do"
    one.batch, one.free_at_ns = batch(), 1500
    assert one.free_from_ns(1000) == 1500
    assert one.free_from_ns(1500) == 1501
    assert one.free_from_ns(1600) == 1701
    assert one.free_from_ns(9500) == 17501

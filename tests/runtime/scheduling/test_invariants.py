"""Random scenarios: whatever comes in whatever order, the rules hold. The simulation checks them at every event."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from te_runtime.errors import ClosedError, StallError

MS = 1_000_000
TASKS = ("a", "b", "c", "d", "e")
TROUBLES = ("none", "fails", "late", "hangs")

requests = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 8),
        "tasks": st.lists(st.sampled_from(TASKS), min_size=1, max_size=5, unique=True).map(tuple),
        "priority": st.sampled_from([0.0, 0.0, 0.25, 1.0, 7.5, 100.0]),
        "deadline_ms": st.one_of(st.none(), st.sampled_from([0.05, 0.4, 1.0, 3.0, 20.0, 300.0])),
        "row_shapes": st.sampled_from([((4,),), ((4,),), ((4,),), ((7,),)]),
        "is_poisoned": st.sampled_from([False] * 9 + [True]),
    }
)
arrivals = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 1_000, 100_000, 700_000, 5 * MS]),  # after the one before
        requests,
        st.one_of(st.none(), st.sampled_from([0, 50_000, 500_000, 3 * MS])),  # cancelled so long after
    ),
    min_size=1,
    max_size=40,
)
executors = st.lists(
    st.fixed_dictionaries(
        {
            "fixed_ns": st.sampled_from([20_000, 200_000, 2 * MS]),
            "row_ns": st.sampled_from([1_000, 50_000]),
            "noise": st.sampled_from([0.0, 0.0, 0.3]),
            "late_ns": st.sampled_from([MS, 40 * MS]),
        }
    ),
    min_size=1,
    max_size=3,
)
troubles = st.lists(st.sampled_from([*["none"] * 6, *TROUBLES]), min_size=1, max_size=12)


def one_after_the_other(plan: list[str]) -> Callable[[object, int], str]:
    """What becomes of an executor's batches; of those after the plan's end nothing bad."""
    left = iter(plan)
    return lambda batch, now_ns: next(left, "none")


def simulate(simulation: ModuleType, scenario: dict[str, Any]) -> Any:
    """A simulation with everything of a scenario planned."""
    plans = scenario["troubles"]
    fakes = []
    for number, options in enumerate(scenario["executors"]):
        trouble = one_after_the_other(plans[number % len(plans) :])
        fakes.append(simulation.FakeExecutor(f"cpu-{number}", **options, trouble=trouble))
    world = simulation.Simulation(
        fakes,
        simulation.limits(
            max_batch=scenario["max_batch"],
            max_delay_ms=scenario["max_delay_ms"],
            max_queue=scenario["max_queue"],
            patience_ms=30.0,
            stall_ms=25.0,
        ),
        seed=scenario["seed"],
        tick_lag_ns=scenario["tick_lag_ns"],
        is_strict=True,
    )

    def arrive(what: dict[str, Any], cancel_after_ns: int | None) -> None:
        request = world.submit(**what)
        if request is not None and cancel_after_ns is not None:
            world.at(world.now_ns + cancel_after_ns, lambda: world.cancel(request))

    now_ns = 0
    for gap_ns, what, cancel_after_ns in scenario["arrivals"]:
        now_ns += gap_ns
        world.at(now_ns, lambda what=what, after=cancel_after_ns: arrive(what, after))
    if scenario["close"] is not None:
        after_ns, drain = scenario["close"]
        world.at(after_ns, lambda: world.close(drain=drain))
    return world


scenarios = st.fixed_dictionaries(
    {
        "arrivals": arrivals,
        "executors": executors,
        "troubles": troubles,
        "max_batch": st.sampled_from([8, 9, 64]),
        "max_delay_ms": st.sampled_from([0.0, 1.0, 30.0]),
        "max_queue": st.sampled_from([1, 5, 1000]),
        "tick_lag_ns": st.sampled_from([0, 0, 200_000]),
        "close": st.one_of(st.none(), st.tuples(st.sampled_from([0, MS, 9 * MS]), st.booleans())),
        "seed": st.integers(0, 3),
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenario=scenarios)
def test_whatever_happens_every_accepted_request_ends_exactly_once(
    simulation: ModuleType, scenario: dict[str, Any]
) -> None:
    """What only executors that never come back could answer is dropped by closing; nothing else is left."""
    world = simulate(simulation, scenario)
    tally = world.run()
    pool = world.dispatcher.pool
    assert any(resource.state != "out" for resource in pool.resources)
    if any(resource.state in ("live", "suspect") for resource in pool.resources):
        world.assert_nothing_left()
    world.close(drain=False)
    world.at(world.now_ns, lambda: None)
    world.run()
    world.assert_nothing_left()
    for request, (outcome, _) in tally.ended.items():
        runs = tally.begun.get(request, [])
        if outcome in ("in_time", "late"):
            assert len(runs) in (1, 2)
            assert request not in world.poisoned
        elif outcome == "cancelled":
            assert not runs
        elif outcome == "failed":
            assert isinstance(tally.errors[request], simulation.FakeError | StallError)
            assert runs


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenario=scenarios, bad=st.integers(0, 39))
def test_a_poisoned_request_fails_alone(simulation: ModuleType, scenario: dict[str, Any], bad: int) -> None:
    """Executors without trouble: whoever is not poisoned is answered, and no executor is taken out."""
    scenario = {**scenario, "troubles": ["none"], "tick_lag_ns": 0, "close": None, "max_queue": 1000}
    scenario["executors"] = [{**options, "noise": 0.0} for options in scenario["executors"]]
    scenario["arrivals"] = [
        (gap, {**what, "deadline_ms": None, "is_poisoned": number == bad}, None)
        for number, (gap, what, _) in enumerate(scenario["arrivals"])
    ]
    world = simulate(simulation, scenario)
    tally = world.run()
    world.assert_nothing_left()
    assert not tally.refused
    for request in tally.accepted:
        expected = "failed" if request in world.poisoned else "in_time"
        assert tally.ended[request][0] == expected
    assert all(resource.state == "live" for resource in world.dispatcher.pool.resources)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenario=scenarios)
def test_one_executor_serves_in_the_order_of_the_score(
    simulation: ModuleType, scenario: dict[str, Any]
) -> None:
    """Each batch is the front of the queue as the specification orders it at that moment; ties are first come."""
    scenario = {**scenario, "troubles": ["none"], "executors": scenario["executors"][:1]}
    world = simulate(simulation, scenario)
    begin = world._begin

    def checked(assignments: Any) -> None:
        for assignment in assignments:
            batch = assignment.batch.requests
            if batch[0] not in world.tally.begun:
                still = [one for one in world.waiting if not one.future.done() and one not in batch]
                assert world.in_order({*batch, *still})[: len(batch)] == batch
        begin(assignments)

    world._begin = checked
    world.run()
    world.assert_nothing_left()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenario=scenarios, gap_ns=st.sampled_from([1, 1_000, 50_000]))
def test_equal_requests_begin_first_come_first_served(
    simulation: ModuleType, scenario: dict[str, Any], gap_ns: int
) -> None:
    """On any number of equal executors."""
    scenario = {**scenario, "troubles": ["none"], "close": None, "max_queue": 1000}
    scenario["executors"] = [{**scenario["executors"][0], "noise": 0.0}] * len(scenario["executors"])
    what = {**scenario["arrivals"][0][1], "is_poisoned": False, "deadline_ms": None}
    scenario["arrivals"] = [(gap_ns, what, None) for _ in scenario["arrivals"]]
    world = simulate(simulation, scenario)
    tally = world.run()
    begun = [tally.begun[request][0] for request in tally.accepted]
    assert begun == sorted(begun)


@pytest.mark.parametrize("drain", [True, False])
def test_closing_in_the_middle_ends_everything(simulation: ModuleType, drain: bool) -> None:
    world = simulation.Simulation([simulation.FakeExecutor("cpu-0")], is_strict=True)
    for number in range(200):
        world.at(number * 1_000, world.submit)
    world.at(100_000, lambda: world.close(drain=drain))
    tally = world.run()
    world.assert_nothing_left()
    assert len(tally.refused) == 99
    assert all(isinstance(error, ClosedError) for _, error in tally.refused)
    assert tally.count("in_time") == (101 if drain else tally.runs[0].rows)
    assert tally.count("dropped") == 101 - tally.count("in_time")

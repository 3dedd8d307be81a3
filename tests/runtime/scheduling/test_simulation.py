"""Scenarios with a clock of their own: what the scheduler promises under load and when executors fail."""

from __future__ import annotations

from random import Random
from types import ModuleType
from typing import Any

import pytest

from te_runtime.errors import StallError

MS = 1_000_000
US = 1_000
S = 1_000_000_000
TASKS = ("a", "b", "c", "d", "e")


def capacity_per_s(executor: Any, max_batch: int = 64) -> float:
    """Rows that an executor answers in a second when every batch is full and asks for every task."""
    return max_batch / executor.exact_ns(len(TASKS), max_batch) * S


def load(world: Any, simulation: ModuleType, per_s: float, duration_ns: int, **what: Any) -> None:
    """Requests for one task each, at random moments."""
    rng = Random(7)
    for when in simulation.poisson_ns(rng, per_s, duration_ns):
        task = rng.choice(TASKS)
        world.at(when, lambda task=task: world.submit(tasks=(task,), **what))


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("deadline_ms", [8.0, 20.0])
def test_three_times_the_load_leaves_goodput_near_capacity(
    simulation: ModuleType, noise: float, deadline_ms: float
) -> None:
    executor = simulation.FakeExecutor("cpu-0", noise=noise)
    world = simulation.Simulation([executor])
    capacity = capacity_per_s(executor)
    load(world, simulation, 3 * capacity, 50 * MS, deadline_ms=deadline_ms)
    tally = world.run()
    world.assert_nothing_left()
    assert tally.count("in_time") / (tally.last_ns() / S) >= 0.9 * capacity
    assert all(isinstance(error, simulation.REFUSALS) for _, error in tally.refused)
    assert len(tally.refused) > len(tally.accepted)


@pytest.mark.parametrize("priority_share", [0.0, 0.2])
def test_at_80_percent_everyone_who_is_let_in_is_in_time(
    simulation: ModuleType, priority_share: float
) -> None:
    executor = simulation.FakeExecutor("cpu-0")
    world = simulation.Simulation([executor])
    rng = Random(3)
    for when in simulation.poisson_ns(rng, 0.8 * capacity_per_s(executor), 120 * MS):
        priority = 5.0 if rng.random() < priority_share else 0.0
        task = rng.choice(TASKS)
        world.at(
            when,
            lambda task=task, priority=priority: world.submit(
                tasks=(task,), priority=priority, deadline_ms=20.0
            ),
        )
    tally = world.run()
    world.assert_nothing_left()
    assert len(tally.accepted) > 3000
    assert tally.count("in_time") >= 0.999 * len(tally.accepted)
    assert len(tally.refused) <= 0.001 * len(tally.accepted)


def test_mixed_priorities_and_deadlines_under_overload(simulation: ModuleType) -> None:
    """What matters more, or sooner, is served more often; nothing breaks a rule."""
    executor = simulation.FakeExecutor("cpu-0")
    world = simulation.Simulation([executor])
    rng = Random(1)
    asked: dict[float, int] = {0.0: 0, 10.0: 0}

    def submit(priority: float, deadline_ms: float) -> None:
        asked[priority] += 1
        world.submit(
            tasks=tuple(rng.sample(TASKS, rng.randint(1, 5))),
            rows=rng.choice([1, 1, 1, 4, 16]),
            priority=priority,
            deadline_ms=deadline_ms,
        )

    for when in simulation.poisson_ns(rng, 1.2 * capacity_per_s(executor) / 4.6 * 2, 100 * MS):
        choice = rng.choice([0.0, 10.0]), rng.choice([5.0, 10.0, 40.0])
        world.at(when, lambda choice=choice: submit(*choice))
    tally = world.run()
    world.assert_nothing_left()
    served = {
        priority: sum(tally.ended[one][0] == "in_time" for one in tally.accepted if one.priority == priority)
        / asked[priority]
        for priority in asked
    }
    assert served[10.0] > 1.5 * served[0.0] > 0.0


def test_a_burst_into_an_idle_scheduler_runs_in_full_batches(simulation: ModuleType) -> None:
    world = simulation.Simulation([simulation.FakeExecutor("cpu-0")], is_strict=True)
    for _ in range(640):
        world.at(0, lambda: world.submit(tasks=("b",)))
    tally = world.run()
    world.assert_nothing_left()
    assert [run.rows for run in tally.runs] == [1, *[64] * 9, 63]
    assert tally.count("in_time") == 640


def test_a_lonely_request_is_not_held(simulation: ModuleType) -> None:
    world = simulation.Simulation(
        [simulation.FakeExecutor("cpu-0")], simulation.limits(max_delay_ms=50), is_strict=True
    )
    for when in range(0, 10 * S, 100 * MS):
        world.at(when, world.submit)
    tally = world.run()
    assert [run.begun_ns for run in tally.runs] == list(range(0, 10 * S, 100 * MS))


def test_a_batch_is_held_while_that_pays_and_never_longer_than_max_delay(simulation: ModuleType) -> None:
    """Requests every 20 us and passes of 2 ms: waiting is worth it, up to max_delay after the oldest came."""
    executor = simulation.FakeExecutor("cpu-0", fixed_ns=2 * MS)
    world = simulation.Simulation([executor], simulation.limits(max_delay_ms=0.5), is_strict=True)
    for when in range(0, 20 * MS, 20 * US):
        world.at(when, world.submit)
    tally = world.run()
    world.assert_nothing_left()
    held = [
        run.begun_ns - min(request.submitted_ns for request in run.requests)
        for before, run in zip(tally.runs, tally.runs[1:], strict=False)
        if run.begun_ns > before.begun_ns + executor.exact_ns(1, before.rows)  # the executor was idle before
    ]
    assert all(0 < held_ns <= 0.5 * MS for held_ns in held)
    assert sum(run.rows for run in tally.runs) / len(tally.runs) > 30


@pytest.mark.parametrize(
    ("slow_factor", "left_ms", "goes_to"),
    [(3, 0.5, "fast"), (1.4, 0.3, "fast"), (1.4, 0.5, "slow"), (1.001, 0.01, "slow")],
)
def test_a_request_goes_where_its_finish_is_earliest(
    simulation: ModuleType, slow_factor: float, left_ms: float, goes_to: str
) -> None:
    """A pass takes 1 ms on the fast executor and more on the slow one; the fast one is busy for `left_ms` more."""
    fast = simulation.FakeExecutor("fast", fixed_ns=MS, row_ns=0, tail_ns=0)
    slow = simulation.FakeExecutor("slow", fixed_ns=slow_factor * MS, row_ns=0, tail_ns=0)
    world = simulation.Simulation([slow, fast], is_strict=True)
    world.at(0, world.submit)
    world.at(round((1 - left_ms) * MS), world.submit)
    tally = world.run()
    assert [run.resource for run in tally.runs] == ["fast", goes_to]


def test_a_slow_executor_takes_part_only_where_it_helps(simulation: ModuleType) -> None:
    fast, slow = (
        simulation.FakeExecutor(
            name, fixed_ns=200_000 * factor, row_ns=10_000 * factor, tail_ns=20_000 * factor
        )
        for name, factor in (("fast", 1), ("slow", 4))
    )
    both = capacity_per_s(fast) + capacity_per_s(slow)
    for part, share in ((0.05, 0.0), (1.5, 0.2)):
        world = simulation.Simulation([slow, fast])
        load(world, simulation, part * both, 60 * MS, deadline_ms=30.0)
        tally = world.run()
        world.assert_nothing_left()
        rows = {
            name: sum(run.rows for run in tally.runs if run.resource == name) for name in ("fast", "slow")
        }
        found = rows["slow"] / (rows["slow"] + rows["fast"])
        assert found == pytest.approx(share, abs=0.06)
        assert tally.count("in_time") >= 0.9 * len(tally.accepted)
    assert tally.count("in_time") / (tally.last_ns() / S) >= 0.9 * both


def test_an_executor_that_always_fails_is_taken_out_and_nobody_notices(simulation: ModuleType) -> None:
    dead = simulation.FakeExecutor("dead", trouble=lambda batch, now_ns: "fails")
    world = simulation.Simulation([dead, simulation.FakeExecutor("good")], is_strict=True)
    load(world, simulation, 20_000, 20 * MS)
    tally = world.run()
    world.assert_nothing_left()
    states = {resource.name: resource.state for resource in world.dispatcher.pool.resources}
    assert states == {"dead": "out", "good": "live"}
    assert tally.count("in_time") == len(tally.accepted)
    assert sum(run.resource == "dead" for run in tally.runs) == 1
    assert world.dispatcher.pool.capacity == 1.0


def test_the_last_executor_is_never_taken_out(simulation: ModuleType) -> None:
    """Two executors that fail at once, each of whose requests succeed on the other: one of them has to stay."""
    once = {"one": True, "two": True}

    def first_fails(name: str) -> Any:
        def trouble(batch: Any, now_ns: int) -> str:
            failed, once[name] = once[name], False
            return "fails" if failed else "none"

        return trouble

    fakes = [simulation.FakeExecutor(name, trouble=first_fails(name)) for name in once]
    world = simulation.Simulation(fakes, is_strict=True)
    for when in (0, 0, 5 * MS, 5 * MS):
        world.at(when, world.submit)
    tally = world.run()
    world.assert_nothing_left()
    assert sorted(resource.state for resource in world.dispatcher.pool.resources) == ["live", "out"]
    assert tally.count("in_time") == 4


def test_executors_that_all_fail_always_give_the_error_and_go_on(simulation: ModuleType) -> None:
    fakes = [simulation.FakeExecutor(name, trouble=lambda batch, now_ns: "fails") for name in ("one", "two")]
    world = simulation.Simulation(fakes, is_strict=True)
    for when in range(0, 20 * MS, MS):
        world.at(when, world.submit)
    tally = world.run()
    world.assert_nothing_left()
    assert tally.count("failed") == 20
    for request in tally.accepted:
        error = tally.errors[request]
        assert isinstance(error, simulation.FakeError)
        assert isinstance(error.__cause__, simulation.FakeError)
        assert error is not error.__cause__
        assert len(tally.begun[request]) == 2


def test_an_executor_that_sometimes_fails_alone_loses_nothing_by_itself(simulation: ModuleType) -> None:
    """One executor, every third batch fails: each request is tried again there, alone."""
    number = iter(range(10**6))
    flaky = simulation.FakeExecutor(
        "flaky",
        trouble=lambda batch, now_ns: (
            "fails" if next(number) % 3 == 0 and len(batch.requests) > 1 else "none"
        ),
    )
    world = simulation.Simulation([flaky], is_strict=True)
    for _ in range(100):
        world.at(0, world.submit)
    tally = world.run()
    world.assert_nothing_left()
    assert tally.count("in_time") == 100


def test_a_poisoned_request_costs_its_batch_a_second_try_and_only_it_fails(simulation: ModuleType) -> None:
    world = simulation.Simulation(
        [simulation.FakeExecutor("one"), simulation.FakeExecutor("two")], is_strict=True
    )
    for number in range(100):
        world.at(number, lambda number=number: world.submit(is_poisoned=number == 50))
    tally = world.run()
    world.assert_nothing_left()
    failed = [request for request in tally.accepted if tally.ended[request][0] == "failed"]
    assert [request.sequence for request in failed] == [50]
    assert tally.count("in_time") == 99
    assert all(resource.state == "live" for resource in world.dispatcher.pool.resources)


def test_what_hangs_is_given_up_after_the_stall_limit_and_tried_elsewhere(simulation: ModuleType) -> None:
    stuck = simulation.FakeExecutor("stuck", fixed_ns=100_000, trouble=lambda batch, now_ns: "hangs")
    world = simulation.Simulation(
        [stuck, simulation.FakeExecutor("good")], simulation.limits(stall_ms=50), is_strict=True
    )
    world.at(0, world.submit)
    tally = world.run()
    world.assert_nothing_left()
    assert [(run.resource, run.begun_ns) for run in tally.runs] == [("stuck", 0), ("good", 50 * MS)]
    assert tally.count("in_time") == 1
    assert world.dispatcher.pool.resources[0].state == "stuck"


def test_a_stuck_executor_that_comes_back_works_again(simulation: ModuleType) -> None:
    late = iter(["late"])
    one = simulation.FakeExecutor("one", trouble=lambda batch, now_ns: next(late, "none"), late_ns=100 * MS)
    world = simulation.Simulation([one], simulation.limits(stall_ms=50), is_strict=True)
    first = []
    world.at(0, lambda: first.append(world.submit()))
    world.at(60 * MS, world.submit)
    tally = world.run()
    world.assert_nothing_left()
    assert tally.ended[first[0]] == ("failed", 50 * MS)
    assert isinstance(tally.errors[first[0]], StallError)
    assert tally.runs[1].begun_ns == pytest.approx(100 * MS, rel=0.01)
    assert world.dispatcher.pool.resources[0].state == "live"


@pytest.mark.parametrize("slow_factor", [1, 10])
def test_nobody_waits_for_long_for_an_executor_that_hangs_while_another_is_idle(
    simulation: ModuleType, slow_factor: int
) -> None:
    """Long before it is given up: soon after what it runs takes longer than it would on the other."""
    fast = simulation.FakeExecutor("fast", trouble=lambda batch, now_ns: "hangs")
    slow = simulation.FakeExecutor(
        "slow", fixed_ns=200_000 * slow_factor, row_ns=10_000 * slow_factor, tail_ns=20_000 * slow_factor
    )
    world = simulation.Simulation([fast, slow], simulation.limits(stall_ms=10_000), is_strict=True)
    requests: list[Any] = []
    world.at(0, world.submit)
    for when in (100_000, 400_000):
        world.at(when, lambda: requests.append(world.submit()))
    tally = world.run()
    pass_ns = slow.exact_ns(1, 2)
    for request in requests:
        assert tally.ended[request][1] - request.submitted_ns <= 4 * pass_ns
    world.assert_nothing_left()


def test_a_second_try_whose_deadline_passes_is_told_at_once(simulation: ModuleType) -> None:
    """It waits for the other executor, which is busy for longer."""
    bad = simulation.FakeExecutor("bad", fixed_ns=2 * MS, trouble=lambda batch, now_ns: "fails")
    busy = simulation.FakeExecutor("busy", fixed_ns=2 * MS, slowdown=lambda now_ns: 20.0)
    world = simulation.Simulation([bad, busy], is_strict=True)
    requests = []
    world.at(0, lambda: requests.append(world.submit(deadline_ms=10.0)))
    world.at(1, lambda: requests.append(world.submit()))
    tally = world.run()
    world.assert_nothing_left()
    assert tally.runs[0].resource == "bad"
    assert tally.ended[requests[0]] == ("expired", 10 * MS)


def test_cancelled_requests_leave_at_once_and_are_never_run(simulation: ModuleType) -> None:
    world = simulation.Simulation([simulation.FakeExecutor("cpu-0")], is_strict=True)
    rng = Random(5)

    def ask_and_regret() -> None:
        request = world.submit(deadline_ms=rng.choice([None, 2.0, 50.0]))
        if request is not None and rng.random() < 0.5:
            world.at(world.now_ns + rng.randrange(300_000), lambda: world.cancel(request))

    for when in simulation.poisson_ns(rng, 50_000, 10 * MS):
        world.at(when, ask_and_regret)
    tally = world.run()
    world.assert_nothing_left()
    cancelled = [request for request, (outcome, _) in tally.ended.items() if outcome == "cancelled"]
    assert len(cancelled) > 50
    assert not any(request in tally.begun for request in cancelled)
    assert all(request.future.cancelled() for request in cancelled)


def test_rows_of_several_shapes_wait_together_and_run_apart(simulation: ModuleType) -> None:
    world = simulation.Simulation([simulation.FakeExecutor("cpu-0")], is_strict=True)
    rng = Random(2)
    for when in simulation.poisson_ns(rng, 30_000, 10 * MS):
        shape = ((rng.choice([4, 4, 4, 4, 7]), 3), (2,))
        world.at(when, lambda shape=shape: world.submit(row_shapes=shape, rows=rng.randint(1, 3)))
    tally = world.run()
    world.assert_nothing_left()
    assert tally.count("in_time") == len(tally.accepted)
    assert {run.requests[0].row_shapes[0] for run in tally.runs} == {(4, 3), (7, 3)}


@pytest.mark.parametrize("patience_ms", [0.0, 20.0])
def test_nothing_starves(simulation: ModuleType, patience_ms: float) -> None:
    """A flood of the highest priority and of tight deadlines, without end, twice what can be served.

    rank_ns's bound: what is submitted later than rank + 100 · Σ r ms ranks behind. So at that moment at most what
    waits then (and one running batch) is before it, and the queue's bound makes that a time.
    """
    executor = simulation.FakeExecutor("cpu-0", fixed_ns=2 * MS, row_ns=0, tail_ns=0)
    bounds = simulation.limits(max_batch=8, max_queue=40, patience_ms=patience_ms)
    world = simulation.Simulation([executor], bounds)
    low: list[Any] = []
    for when in range(0, 300 * MS, 125_000):
        world.at(when, lambda: world.submit(priority=100.0, deadline_ms=1e4))
    for when in (5 * MS, 10 * MS, 50 * MS):
        world.at(when + 1_999, lambda: low.append(world.submit(priority=0.0)))  # a batch was just taken
    tally = world.run()
    low = [request for request in low if request is not None]
    assert low
    passes_ns = (40 // 8 + 2) * 2 * MS
    for request in low:
        begun = tally.begun[request][0]
        assert begun <= request.rank_ns + 100 * MS + passes_ns
        for other in tally.accepted:
            if other.submitted_ns > request.rank_ns + 100 * MS:
                assert tally.begun[other][0] >= begun


def test_the_estimate_follows_an_executor_that_becomes_slower(simulation: ModuleType) -> None:
    """From 50 ms on everything takes three times as long: soon what is let in is in time again."""
    executor = simulation.FakeExecutor("cpu-0", slowdown=lambda now_ns: 3.0 if now_ns > 50 * MS else 1.0)
    world = simulation.Simulation([executor])
    load(world, simulation, 0.25 * capacity_per_s(executor), 300 * MS, deadline_ms=10.0)
    tally = world.run()
    world.assert_nothing_left()
    latency = world.dispatcher.pool.resources[0].latency
    sizes = sorted(run.rows for run in tally.runs[-40:])
    usual = sizes[len(sizes) // 2]
    assert latency.expect(("a", "b", "c"), usual) == pytest.approx(3 * executor.exact_ns(3, usual), rel=0.1)
    after = [one for one in tally.accepted if one.submitted_ns > 100 * MS]
    assert len(after) > 500
    assert sum(tally.ended[one][0] == "in_time" for one in after) >= 0.99 * len(after)


def test_after_a_passing_disturbance_requests_are_let_in_again(simulation: ModuleType) -> None:
    """100 times slower for 20 ms: no request could be in time, so none would run and correct the estimate."""
    executor = simulation.FakeExecutor("cpu-0", slowdown=lambda now_ns: 100.0 if now_ns < 20 * MS else 1.0)
    world = simulation.Simulation([executor], simulation.limits(stall_ms=10_000))
    for when in range(0, 1000 * MS, 2 * MS):
        world.at(when, lambda: world.submit(deadline_ms=10.0))
    tally = world.run()
    world.assert_nothing_left()
    assert tally.refused
    late = [request for request in tally.accepted if request.submitted_ns >= 300 * MS]
    assert len(late) == 350
    assert all(tally.ended[request][0] == "in_time" for request in late)

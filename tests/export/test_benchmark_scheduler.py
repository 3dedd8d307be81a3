"""scripts/benchmark_scheduler.py: loads ask as they say, searches find, tables say what was found. No timing claims."""

from __future__ import annotations

import dataclasses
import math
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_deadlines import find_capacity, holds
from scheduler_load import (
    Arrivals,
    OpenRun,
    Rate,
    Row,
    Stream,
    WindowClient,
    drive,
    machine_cpu_s,
    poisson_arrivals,
    send,
)
from scheduler_million import Tally, check
from scheduler_table import Million, markdown, million_rows, ratios, spread
from scheduler_throughput import QUIET_CPUS, Case, Measured, best

import te_runtime
from te_runtime.scheduling.metrics import MetricsRecorder
from te_runtime.scheduling.request import Request

TASKS = ("click", "buy")


class FakeScheduler:
    """Answers at once, or never, or refuses; counts."""

    def __init__(
        self, refused: type[te_runtime.SchedulerError] | None = None, error: Exception | None = None
    ) -> None:
        self.seen: list[tuple[str, float | None]] = []
        self._refused = refused
        self._error = error

    def submit(self, x: Row, *, task: str, deadline_ms: float | None = None) -> Future[Any]:
        self.seen.append((task, deadline_ms))
        if self._refused is te_runtime.QueueFullError:
            raise te_runtime.QueueFullError(1)
        if self._refused is te_runtime.DeadlineError:
            raise te_runtime.DeadlineError(1.0, 2.0)
        future: Future[Any] = Future()
        if self._error is not None:
            future.set_exception(self._error)
        else:
            future.set_result(x)
        return future


def stream(seed: int = 0) -> Stream:
    return Stream(TASKS, width=3, seed=seed, rows=4)


def test_a_stream_asks_for_every_task_with_rows_of_the_width_and_the_same_ones_again() -> None:
    requests = stream().requests

    assert {task for _, task in requests} == set(TASKS)
    assert {row.shape for row, _ in requests} == {(1, 3)}
    assert [task for _, task in requests] == [task for _, task in stream().requests]
    assert [task for _, task in requests] != [task for _, task in stream(1).requests]


@given(rate=st.floats(1, 2000), seconds=st.floats(0.1, 3), seed=st.integers(0, 99))
def test_arrivals_ascend_within_the_run(rate: float, seconds: float, seed: int) -> None:
    times = poisson_arrivals(rate, seconds, seed).times_ns

    assert times == sorted(times)
    assert all(0 <= time <= seconds * 1e9 for time in times)
    assert times == poisson_arrivals(rate, seconds, seed).times_ns


def test_gaps_between_arrivals_are_those_of_a_poisson_process() -> None:
    gaps = np.diff(poisson_arrivals(1000.0, 50.0, 0).times_ns) / 1e9

    assert np.mean(gaps) == pytest.approx(1e-3, rel=0.02)
    assert np.std(gaps) == pytest.approx(1e-3, rel=0.04)


class WindowScheduler:
    """Answers the oldest once as many as it was told are outstanding."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.open: list[Future[Any]] = []
        self.most = 0

    def submit(self, x: Row, *, task: str, deadline_ms: float | None = None) -> Future[Any]:
        future: Future[Any] = Future()
        self.open.append(future)
        self.most = max(self.most, len(self.open))
        if len(self.open) == self.window:
            self.open.pop(0).set_result(task)
        return future


def test_a_client_fills_its_window_and_no_more() -> None:
    scheduler = WindowScheduler(8)
    client = WindowClient(scheduler.submit, stream(), window=8)

    rate = drive([_Limited(client, scheduler)], seconds=0.02, warm_s=0.01)

    assert scheduler.most == 8
    assert rate.per_s > 0


class _Limited:
    """A client whose scheduler answers what is left when it finishes."""

    def __init__(self, client: WindowClient, scheduler: WindowScheduler) -> None:
        self._client = client
        self._scheduler = scheduler

    def run(self, until_ns: int) -> int:
        return self._client.run(until_ns)

    def finish(self) -> None:
        for future in self._scheduler.open:
            future.set_result(None)
        self._client.finish()


def test_a_client_s_error_is_not_swallowed() -> None:
    scheduler = FakeScheduler(error=ValueError("broken"))

    with pytest.raises(ValueError, match="broken"):
        drive([WindowClient(scheduler.submit, stream(), window=4)], seconds=0.01, warm_s=0.0)


def test_every_arrival_is_sent_once_and_counted_once() -> None:
    arrivals = Arrivals(100.0, 30.0, [0] * 50)
    scheduler = FakeScheduler()

    run = send(scheduler.submit, stream(), arrivals, deadline_ms=None)

    assert run.sent == run.admitted == len(scheduler.seen) == len(run.latencies_ns) == 50
    assert run.hopeless == 0
    assert {deadline for _, deadline in scheduler.seen} == {None}
    assert all(latency >= wait for latency, wait in zip(run.latencies_ns, run.waits_ns, strict=True))


@pytest.mark.parametrize("refused", [te_runtime.QueueFullError, te_runtime.DeadlineError])
def test_refusals_are_told_apart_from_answers(refused: type[te_runtime.SchedulerError]) -> None:
    run = send(FakeScheduler(refused).submit, stream(), Arrivals(1.0, 30.0, [0] * 9), deadline_ms=None)

    assert (run.sent, run.admitted, len(run.refused_ns), len(run.latencies_ns)) == (9, 0, 9, 0)


def test_errors_of_requests_let_in_are_named() -> None:
    scheduler = FakeScheduler(error=te_runtime.DeadlineError(1.0, waited_ms=2.0))

    run = send(scheduler.submit, stream(), Arrivals(1.0, 30.0, [0] * 3), deadline_ms=None)

    assert run.errors == ["DeadlineError"] * 3
    assert not run.latencies_ns


def test_a_deadline_counts_from_the_planned_arrival_and_what_is_past_it_is_not_sent() -> None:
    """An arrival planned ten seconds before the run began stands for a generator that is ten seconds late."""
    late = Arrivals(1.0, 30.0, [-10_000_000_000, -10_000_000_000, 0])
    scheduler = FakeScheduler()

    run = send(scheduler.submit, stream(), late, deadline_ms=5_000.0)
    assert (run.hopeless, run.sent) == (2, 1)
    assert all(deadline is not None and deadline <= 5_000.0 for _, deadline in scheduler.seen)

    run = send(scheduler.submit, stream(), late, deadline_ms=5_000.0, from_arrival=False)
    assert (run.hopeless, run.sent) == (0, 3)
    assert run.in_time_from_submission(5_000.0) == 3
    assert run.in_time(5_000.0) == 1


def test_holding_a_rate_needs_the_answers_of_what_was_planned_though_it_was_never_sent() -> None:
    run = OpenRun(Arrivals(100.0, 1.0, list(range(100))))
    run.ended_ns.extend([500_000_000] * 98)
    assert not holds(run)
    run.ended_ns.append(1_030_000_000)
    assert not holds(run)
    run.ended_ns.append(1_010_000_000)
    assert holds(run)


@given(limit=st.floats(200, 5_000), highest=st.floats(6_000, 10_000))
def test_the_search_finds_the_highest_rate_that_is_held(limit: float, highest: float) -> None:
    found = find_capacity(lambda rate, _: rate <= limit, highest)
    assert found <= limit
    assert found >= limit - highest / 2**6


def test_a_rate_that_is_not_confirmed_is_lowered_and_none_at_all_is_said() -> None:
    assert find_capacity(lambda rate, confirming: rate <= (90 if confirming else 100), 128) == pytest.approx(
        100 * 0.95**3
    )
    with pytest.raises(SystemExit, match="too busy"):
        find_capacity(lambda *_: False, 100.0)


def test_the_machine_s_cpu_time_leaves_idle_and_waiting_out_and_counts_what_was_stolen(
    tmp_path: Path,
) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 9999 9999 4 5 6 0 0\ncpu0 1 1 1 1\n")

    assert machine_cpu_s(stat) == 165 / os.sysconf("SC_CLK_TCK")
    assert math.isnan(machine_cpu_s(tmp_path / "none"))


def measured(kind: str, batch: int, rates: list[float], others: float = 0.0) -> list[Measured]:
    case = Case(kind, "fp32", batch, 2)
    return [Measured(case, number, Rate(rate, 0.1, 1.0, others), 1) for number, rate in enumerate(rates)]


def test_the_best_case_is_that_of_the_highest_median_and_ratios_are_of_the_same_repetition() -> None:
    low, high = measured("joint", 32, [9.0, 1.0, 1.0]), measured("joint", 64, [2.0, 4.0, 3.0])
    found = [*high[::-1], *low]

    assert best(found, "joint", "fp32") == high
    assert best(found, "joint", "fp32", batch=32) == low
    assert ratios(high, low) == [2 / 9, 4.0, 3.0]


def test_disturbed_runs_are_known() -> None:
    assert not measured("joint", 1, [1.0], QUIET_CPUS)[0].is_disturbed
    assert measured("joint", 1, [1.0], QUIET_CPUS + 0.01)[0].is_disturbed


def test_tables() -> None:
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00 to 3.00, n=3)"
    rows = list(
        million_rows(Million(40_000, 9.6, {"answered": 40_000}, [[10_000, 2048, 1024], [40_000, 4096, 1024]]))
    )
    assert rows[1] == (
        "RSS growth from request 10,000 on",
        "0",
        "2 KiB; 0 KiB in the second half; 4 KiB at the end",
    )
    assert markdown(rows).count("\n") == len(rows) + 1


def tally(ends: int, **seen: int) -> Tally:
    found = Tally()
    found.seen.update(seen)
    for _ in range(ends):
        found.told(Future())
    return found


def metrics(answered: int, refused: int) -> te_runtime.SchedulerMetrics:
    request = Request((), (), 1, ("click",), True, 0.0, None, 0, 0)
    recorder = MetricsRecorder(TASKS)
    for _ in range(answered):
        recorder.accepted()
    for _ in range(refused):
        recorder.refused("deadline")
    recorder.answered([request] * answered, answered, done_ns=1_000_000)
    return recorder.report(
        queue_length=0, running=0, prediction_error=0, prediction_absolute_error=0, executors=(), uptime_s=1
    )


def test_requests_that_ended_twice_or_never_or_are_counted_otherwise_are_found() -> None:
    check(tally(4, answered=4, refused=1), metrics(4, 1), 5)
    for wrong, counted in (
        (tally(5, answered=4, refused=1), metrics(4, 1)),
        (tally(3, answered=4, refused=1), metrics(4, 1)),
        (tally(4, answered=3, refused=1), metrics(4, 1)),
        (tally(4, answered=4, refused=1), metrics(3, 1)),
        (tally(4, answered=4, refused=1), dataclasses.replace(metrics(4, 1), running=1)),
    ):
        with pytest.raises(SystemExit, match="5 requests were sent"):
            check(wrong, counted, 5)

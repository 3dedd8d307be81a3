"""The scheduler with real threads: on a real bundle, and on a model whose pace and failures a test decides."""

from __future__ import annotations

import asyncio
import copy
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as WaitTimeoutError
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import te_runtime
from te_runtime import (
    ClosedError,
    DeadlineError,
    InputError,
    QueueFullError,
    Scheduler,
    StallError,
)

LIMIT_S = 30


def row(value: float, rows: int = 1) -> NDArray[np.float32]:
    return np.full((rows, 2), value, dtype=np.float32)


@pytest.fixture
def held(model: Any, make: Callable[..., Scheduler]) -> Scheduler:
    """A scheduler whose only executor is busy with a batch until model.gate is set."""
    scheduler = make(model, max_queue=4)
    occupy(scheduler, model)
    return scheduler


def occupy(scheduler: Scheduler, model: Any) -> Future[Any]:
    model.gate.clear()
    first = scheduler.submit(row(0), task="a")
    assert model.entered.wait(LIMIT_S)
    return first


# --- answers -----------------------------------------------------------------------------------------------------


def test_answers_are_those_of_predict(pristine: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6)).astype(np.float32)
    wanted = [("task_0",), ("task_1",), ("task_1", "task_0"), ("task_0", "task_1")]
    with te_runtime.load(pristine, threads=1) as model, Scheduler(model, executors=2) as scheduler:
        expected = model.predict(x)
        futures = []
        for number in range(40):
            rows = slice(number, min(40, number + 1 + number % 3))
            tasks = wanted[number % 4]
            futures.append((rows, tasks, scheduler.submit(x[rows], tasks=tasks)))
        for rows, tasks, future in futures:
            found = future.result(LIMIT_S)
            assert tuple(found) == tasks
            for task in tasks:
                np.testing.assert_allclose(
                    found[task].output, expected[task].output[rows], rtol=1e-5, atol=1e-6
                )
                assert found[task].routing_weights is not None
                assert expected[task].routing_weights is not None
                np.testing.assert_allclose(
                    found[task].routing_weights, expected[task].routing_weights[rows], rtol=1e-5, atol=1e-6
                )
        single = scheduler.submit(x[:1], task="task_1").result(LIMIT_S)
        np.testing.assert_allclose(single.output, expected["task_1"].output[:1], rtol=1e-5, atol=1e-6)
        assert list(scheduler.submit(x[:1]).result(LIMIT_S)) == ["task_0", "task_1"]


@pytest.mark.parametrize("mode", ["joint", "split", "task"])
def test_every_mode_answers_alike(pristine: Path, mode: Any) -> None:
    x = np.random.default_rng(1).normal(size=(9, 6)).astype(np.float32)
    with te_runtime.load(pristine, threads=1, mode=mode) as model, Scheduler(model, executors=1) as scheduler:
        expected = model.predict(x)
        futures = [scheduler.submit(x[i : i + 1], task=f"task_{i % 2}") for i in range(9)]
        for number, future in enumerate(futures):
            found = future.result(LIMIT_S).output
            np.testing.assert_allclose(
                found, expected[f"task_{number % 2}"].output[number : number + 1], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize(
    "options",
    [{"two_inputs": True}, {"gates_read_inputs": True}, {"trunk": False}, {"gated": False}],
    ids=str,
)
def test_models_of_every_kind(tiny: ModuleType, tmp_path: Path, options: dict[str, bool]) -> None:
    tiny.write_tiny_bundle(tmp_path / "b", **options)
    rng = np.random.default_rng(2)
    with te_runtime.load(tmp_path / "b", threads=1) as model, Scheduler(model, executors=1) as scheduler:
        x = {spec.name: rng.normal(size=(8, spec.shape[1])).astype(np.float32) for spec in model.inputs}
        expected = model.predict(x)
        feeds = [{name: array[i : i + 1] for name, array in x.items()} for i in range(8)]
        futures = [scheduler.submit(feeds[i], tasks=["task_1", "task_0"]) for i in range(8)]
        for number, future in enumerate(futures):
            for task, answer in future.result(LIMIT_S).items():
                np.testing.assert_allclose(
                    answer.output, expected[task].output[number : number + 1], rtol=1e-5, atol=1e-6
                )


def test_tasks_share_one_pass_and_each_tail_has_its_own_rows(model: Any, held: Scheduler) -> None:
    futures = [
        held.submit(row(1), task="a"),
        held.submit(row(2, rows=3), tasks=["b", "c"]),
        held.submit(row(3), task="c"),
    ]
    model.gate.set()
    wait(futures, LIMIT_S)
    assert model.batches[1:] == [{"a": 1, "b": 3, "c": 4}]
    assert futures[0].result().output.tolist() == [[0, 1]]
    assert futures[1].result()["c"].output.tolist() == [[2, 2]] * 3
    assert futures[1].result()["b"].output.tolist() == [[1, 2]] * 3
    assert futures[2].result().output.tolist() == [[2, 3]]


def test_what_the_caller_changes_after_submit_changes_nothing(model: Any, held: Scheduler) -> None:
    x = row(5)
    future = held.submit(x, task="a")
    x[:] = 6
    model.gate.set()
    assert future.result(LIMIT_S).output.tolist() == [[0, 5]]


def test_no_rows_need_no_executor(model: Any, held: Scheduler) -> None:
    assert held.submit(np.zeros((0, 2), np.float32), task="b").result(0).output.shape == (0, 2)
    assert list(held.submit(np.zeros((0, 2), np.float32)).result(0)) == ["a", "b", "c"]


def test_utilization_counts_what_the_scheduler_answered(pristine: Path) -> None:
    with te_runtime.load(pristine, threads=1) as model, Scheduler(model, executors=1) as scheduler:
        model.utilization(reset=True)
        scheduler.submit(np.zeros((3, 6), np.float32), task="task_1").result(LIMIT_S)
        used = model.utilization()
    assert (used["task_0"].rows, used["task_1"].rows) == (0, 3)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (row(1), {"task": "d"}, "unknown task 'd'"),
        (row(1), {"task": "a", "tasks": ["b"]}, "task and tasks were both given"),
        (row(1), {"tasks": []}, "tasks is empty"),
        (row(1), {"task": ["a"]}, r"\['a'\]"),
        (row(1), {"priority": 101}, "priority: found 101, expected a number from 0 to 100"),
        (row(1), {"priority": float("nan")}, "priority: found nan"),
        (row(1), {"priority": None}, "priority: found None"),
        (row(1), {"priority": False}, "priority: found False"),
        (row(1), {"deadline_ms": 0}, "deadline_ms: found 0"),
        (row(1), {"deadline_ms": float("inf")}, "deadline_ms: found inf"),
        (row(1, rows=65), {"task": "a"}, "x has 65 rows, expected at most max_batch=64"),
        (np.zeros((1, 3), np.float32), {"task": "a"}, "shape"),
    ],
)
def test_bad_requests(
    model: Any, make: Callable[..., Scheduler], x: Any, options: dict[str, Any], message: str
) -> None:
    scheduler = make(model)
    with pytest.raises(InputError, match=message):
        scheduler.submit(x, **options)
    assert scheduler.metrics().accepted == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch"),
        ({"max_delay_ms": -1}, "max_delay_ms"),
        ({"max_queue": 0}, "max_queue"),
        ({"executors": 0}, "executors"),
        ({"when_full": "wait"}, "when_full: found 'wait', expected 'refuse' or 'block'"),
        ({"patience_ms": float("nan")}, "patience_ms"),
        ({"stall_timeout_s": 0}, "stall_timeout_s"),
    ],
)
def test_bad_options(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scheduler(model, **options)


def test_models_that_do_not_fit_together(fake_model: ModuleType, model: Any) -> None:
    with pytest.raises(InputError, match="no model"):
        Scheduler([])
    with pytest.raises(InputError, match="same model is there twice"):
        Scheduler([model, model])
    with pytest.raises(InputError, match="differ in inputs or tasks"):
        Scheduler([model, fake_model.FakeModel(("a",))])


def test_a_full_queue_refuses_at_once(model: Any, held: Scheduler) -> None:
    waiting = [held.submit(row(1), task="a") for _ in range(4)]
    with pytest.raises(QueueFullError, match="4 requests wait"):
        held.submit(row(2), task="a")
    model.gate.set()
    wait(waiting, LIMIT_S)
    assert held.submit(row(2), task="a").result(LIMIT_S).output.tolist() == [[0, 2]]
    assert held.metrics().refused["queue_full"] == 1


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long refused callers slept, each time."""
    found: list[float] = []
    monkeypatch.setattr("te_runtime.scheduling.scheduler.time.sleep", found.append)
    return found


def test_refused_callers_let_executors_with_work_have_the_lock(held: Scheduler, naps: list[float]) -> None:
    for _ in range(4):
        held.submit(row(1), task="a")
    begun = time.perf_counter()
    for _ in range(1000):
        with pytest.raises(QueueFullError):
            held.submit(row(2), task="a")
    elapsed = time.perf_counter() - begun
    assert (
        len(naps) >= 1000 - 10 - elapsed / 100e-6
    )  # as the naps take no time here, all but a few come too soon
    assert max(naps) <= 1e-3
    assert min(naps) > 200e-6


def test_a_few_refusals_may_come_at_once(held: Scheduler, naps: list[float]) -> None:
    for _ in range(4):
        held.submit(row(1), task="a")
    for _ in range(3):
        with pytest.raises(QueueFullError):
            held.submit(row(2), task="a")
    assert naps == []


def test_refused_coroutines_do_not_stop_the_loop(
    held: Scheduler, monkeypatch: pytest.MonkeyPatch, naps: list[float]
) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(delay: float) -> None:
        pauses.append(delay)
        await sleep(delay)

    async def ask() -> list[object]:
        return await asyncio.gather(
            *(held.infer(row(2), task="a") for _ in range(40)), return_exceptions=True
        )

    for _ in range(4):
        held.submit(row(1), task="a")
    monkeypatch.setattr("te_runtime.scheduling.scheduler.asyncio.sleep", note)
    assert {type(one) for one in asyncio.run(ask())} == {QueueFullError}
    assert naps == []
    assert 0 < max(pauses) <= 1e-3


def test_who_waits_for_a_place_was_not_refused(model: Any, make: Callable[..., Scheduler]) -> None:
    scheduler = make(model, max_queue=1, when_full="block")
    occupy(scheduler, model)
    scheduler.submit(row(1), task="a")
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(scheduler.submit, row(2), task="a")
        with pytest.raises(WaitTimeoutError):
            third.result(0.05)
        model.gate.set()
        third.result(LIMIT_S).result(LIMIT_S)
    assert scheduler.metrics().refused == {"queue_full": 0, "deadline": 0, "closed": 0}


def test_who_is_refused_while_nothing_waits_is_not_held_up(
    model: Any, make: Callable[..., Scheduler], naps: list[float]
) -> None:
    scheduler = make(model)
    for _ in range(10):
        with pytest.raises(DeadlineError):
            scheduler.submit(row(1), task="a", deadline_ms=1e-6)
    assert naps == []


def test_a_full_queue_lets_a_thread_wait(model: Any, make: Callable[..., Scheduler]) -> None:
    scheduler = make(model, max_queue=1, when_full="block")
    occupy(scheduler, model)
    second = scheduler.submit(row(1), task="a")
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(scheduler.submit, row(2), task="a")
        with pytest.raises(WaitTimeoutError):
            third.result(0.05)
        model.gate.set()
        assert third.result(LIMIT_S).result(LIMIT_S).output.tolist() == [[0, 2]]
    assert second.done()


def test_close_wakes_who_waits_for_a_place(model: Any, make: Callable[..., Scheduler]) -> None:
    scheduler = make(model, max_queue=1, when_full="block")
    occupy(scheduler, model)
    second = scheduler.submit(row(1), task="a")
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(scheduler.submit, row(2), task="a")
        time.sleep(0.02)
        closing = pool_of_one(lambda: scheduler.close(drain=False))
        with pytest.raises(ClosedError):
            third.result(LIMIT_S)
        with pytest.raises(ClosedError, match="closed before this request ran"):
            second.result(LIMIT_S)
        model.gate.set()
        closing.join(LIMIT_S)


def pool_of_one(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


# --- deadlines and order -----------------------------------------------------------------------------------------


def test_what_cannot_be_in_time_is_refused_with_the_prediction(
    model: Any, make: Callable[..., Scheduler]
) -> None:
    model.delay_s = 0.02
    scheduler = make(model)
    with pytest.raises(DeadlineError, match="refused: it would be answered after") as caught:
        scheduler.submit(row(1), task="a", deadline_ms=5)
    assert caught.value.predicted_ms is not None
    assert caught.value.predicted_ms > 15
    assert caught.value.allowed_ms == pytest.approx(5)
    assert scheduler.submit(row(1), task="a", deadline_ms=10_000).result(LIMIT_S)
    assert model.batches == [{"a": 1}]


def test_what_expires_in_the_queue_never_runs(model: Any, held: Scheduler) -> None:
    late = held.submit(row(1), task="b", deadline_ms=30)
    with pytest.raises(DeadlineError, match="passed while it waited") as caught:
        late.result(LIMIT_S)  # the executor is still busy: the timekeeper tells
    assert caught.value.waited_ms is not None
    assert caught.value.waited_ms >= 30
    model.gate.set()
    assert held.submit(row(2), task="c").result(LIMIT_S)
    assert model.batches[1:] == [{"c": 1}]
    assert held.metrics().outcomes["expired"] == 1


def test_priority_comes_first_and_equals_in_turn(model: Any, make: Callable[..., Scheduler]) -> None:
    scheduler = make(model, max_batch=1)
    occupy(scheduler, model)
    order: list[float] = []
    futures = []
    for value, priority in [(1, 0), (2, 50), (3, 0), (4, 50)]:
        future = scheduler.submit(row(value), task="a", priority=priority, deadline_ms=60_000)
        future.add_done_callback(lambda done: order.append(done.result().output[0, 1]))
        futures.append(future)
    model.gate.set()
    wait(futures, LIMIT_S)
    scheduler.close()
    assert order == [2, 4, 1, 3]


def test_a_batch_is_held_no_longer_than_max_delay(model: Any, make: Callable[..., Scheduler]) -> None:
    model.delay_s = 0.05  # a pass is dear, so holding pays
    scheduler = make(model, max_delay_ms=200)
    model.delay_s = 0.0
    futures = [scheduler.submit(row(value), task="a") for value in range(5)]
    wait(futures, LIMIT_S)
    assert all(future.done() for future in futures)
    assert sum(sum(batch.values()) for batch in model.batches) == 5


# --- cancelling --------------------------------------------------------------------------------------------------


def test_cancelled_requests_leave_the_queue_at_once(model: Any, held: Scheduler) -> None:
    waiting = [held.submit(row(1), task="b") for _ in range(4)]
    assert waiting[1].cancel()
    assert waiting[1].cancel()
    assert held.metrics().queue_length == 3
    again = held.submit(row(2), task="c")
    model.gate.set()
    wait([waiting[0], waiting[2], waiting[3], again], LIMIT_S)
    with pytest.raises(CancelledError):
        waiting[1].result()
    assert model.batches[1:] == [{"b": 3, "c": 1}]
    assert held.metrics().outcomes["cancelled"] == 1
    assert not again.cancel()


def test_what_runs_cannot_be_cancelled(model: Any, make: Callable[..., Scheduler]) -> None:
    scheduler = make(model)
    first = occupy(scheduler, model)
    assert not first.cancel()
    model.gate.set()
    assert first.result(LIMIT_S)


# --- asyncio -----------------------------------------------------------------------------------------------------


def test_coroutines(model: Any, make: Callable[..., Scheduler]) -> None:
    scheduler = make(model, executors=2)

    async def ask() -> list[Any]:
        return await asyncio.gather(
            *(scheduler.infer(row(value), task="b") for value in range(50)),
            scheduler.infer(row(7), tasks=["c", "a"]),
        )

    *singles, both = asyncio.run(asyncio.wait_for(ask(), LIMIT_S))
    assert [answer.output.tolist() for answer in singles] == [[[1, value]] for value in range(50)]
    assert list(both) == ["c", "a"]


def test_a_coroutine_waits_for_a_place_without_blocking_its_loop(
    model: Any, make: Callable[..., Scheduler]
) -> None:
    scheduler = make(model, max_queue=1, when_full="block")
    occupy(scheduler, model)

    async def ask() -> list[Any]:
        tasks = [asyncio.create_task(scheduler.infer(row(value), task="b")) for value in range(5)]
        await asyncio.sleep(0.02)
        assert not any(task.done() for task in tasks)
        model.gate.set()
        return await asyncio.gather(*tasks)

    answers = asyncio.run(asyncio.wait_for(ask(), LIMIT_S))
    assert [answer.output.tolist() for answer in answers] == [[[1, value]] for value in range(5)]


def test_cancelling_a_coroutine_takes_its_request_back(model: Any, held: Scheduler) -> None:
    async def ask() -> None:
        task = asyncio.create_task(held.infer(row(1), task="b"))
        await asyncio.sleep(0.02)
        assert held.metrics().queue_length == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert held.metrics().queue_length == 0

    asyncio.run(asyncio.wait_for(ask(), LIMIT_S))
    model.gate.set()
    held.close()
    assert model.batches == [{"a": 1}]


def test_errors_reach_coroutines(model: Any, make: Callable[..., Scheduler], fake_model: ModuleType) -> None:
    scheduler = make(model)
    with pytest.raises(ArithmeticError, match="poisoned"):
        asyncio.run(scheduler.infer(row(fake_model.POISON), task="a"))


# --- failures ----------------------------------------------------------------------------------------------------


def test_a_poisoned_request_fails_alone(
    model: Any, make: Callable[..., Scheduler], fake_model: ModuleType
) -> None:
    scheduler = make(model)
    occupy(scheduler, model)
    values = [1, 2, fake_model.POISON, 4]
    futures = [scheduler.submit(row(value), task="b") for value in values]
    model.gate.set()
    for value, future in zip(values, futures, strict=True):
        if value == fake_model.POISON:
            with pytest.raises(ArithmeticError, match="poisoned") as caught:
                future.result(LIMIT_S)
            assert isinstance(caught.value.__cause__, ArithmeticError)
        else:
            assert future.result(LIMIT_S).output.tolist() == [[1, value]]
    metrics = scheduler.metrics()
    assert metrics.outcomes["failed"] == 1
    assert metrics.executors[0].state == "live"


def test_a_failing_executor_is_taken_out_and_its_requests_are_answered_elsewhere(
    model: Any, make: Callable[..., Scheduler], fake_model: ModuleType
) -> None:
    bad = fake_model.FakeModel(name="bad")
    scheduler = make([bad, model])

    def break_down(rows: Any) -> None:
        raise MemoryError("the device is gone")

    bad.fails = break_down
    futures = [scheduler.submit(row(value), task="b") for value in range(200)]
    for value, future in enumerate(futures):
        assert future.result(LIMIT_S).output.tolist() == [[1, value]]
    states = {entry.name: (entry.state, entry.error) for entry in scheduler.metrics().executors}
    assert states == {"cpu-0": ("out", "MemoryError: the device is gone"), "cpu-1": ("live", None)}
    before = len(bad.batches)
    assert scheduler.submit(row(1), task="a").result(LIMIT_S)
    assert len(bad.batches) == before


def test_an_executor_that_does_not_come_back(
    model: Any, make: Callable[..., Scheduler], fake_model: ModuleType
) -> None:
    stuck = fake_model.FakeModel(name="stuck")
    scheduler = make([stuck, model], stall_timeout_s=0.05)
    stuck.gate.clear()
    futures = []
    while (
        not stuck.entered.is_set()
    ):  # which of two equals has the first batch is decided by what warming up measured
        futures.append(scheduler.submit(row(len(futures)), task="a"))
        time.sleep(0.001)
    for value, future in enumerate(futures):
        assert future.result(LIMIT_S).output.tolist() == [[0, value]]  # the other one answered them
    assert scheduler.submit(row(3), task="c").result(LIMIT_S)
    assert scheduler.metrics().executors[0].state == "stuck"
    stuck.gate.set()
    deadline = time.monotonic() + LIMIT_S
    while scheduler.metrics().executors[0].state != "live" and time.monotonic() < deadline:
        time.sleep(0.005)
    assert scheduler.metrics().executors[0].state == "live"


def test_the_only_executor_does_not_come_back(model: Any, make: Callable[..., Scheduler]) -> None:
    scheduler = make(model, stall_timeout_s=0.05)
    first = occupy(scheduler, model)
    with pytest.raises(StallError, match=r"executor cpu-0 has not come back from a batch within 0\.05 s"):
        first.result(LIMIT_S)
    waiting = scheduler.submit(row(1), task="b")
    begun = time.monotonic()
    scheduler.close(timeout_s=0.1)
    assert time.monotonic() - begun < LIMIT_S / 2
    with pytest.raises(ClosedError):
        waiting.result(LIMIT_S)


def test_a_model_closed_under_the_scheduler(pristine: Path) -> None:
    with Scheduler(model := te_runtime.load(pristine, threads=1), executors=1) as scheduler:
        model.close()
        with pytest.raises(ClosedError, match="the model was closed"):
            scheduler.submit(np.zeros((1, 6), np.float32), task="task_0").result(LIMIT_S)


# --- ending ------------------------------------------------------------------------------------------------------


def test_close_answers_what_waits(model: Any, held: Scheduler) -> None:
    waiting = [held.submit(row(value), task="a") for value in range(4)]
    closing = pool_of_one(held.close)
    time.sleep(0.02)
    with pytest.raises(ClosedError, match="the scheduler was closed"):
        held.submit(row(1), task="a")
    model.gate.set()
    closing.join(LIMIT_S)
    assert not closing.is_alive()
    assert [future.result(0).output[0, 1] for future in waiting] == [0, 1, 2, 3]
    held.close()


def test_close_drops_what_waits_when_asked(model: Any, held: Scheduler) -> None:
    waiting = [held.submit(row(value), task="a") for value in range(4)]
    closing = pool_of_one(lambda: held.close(drain=False))
    for future in waiting:
        with pytest.raises(ClosedError, match="closed before this request ran"):
            future.result(LIMIT_S)
    model.gate.set()
    closing.join(LIMIT_S)
    assert held.metrics().outcomes == {
        "in_time": 1, "late": 0, "failed": 0, "expired": 0, "cancelled": 0, "dropped": 4,
    }  # fmt: skip


def test_draining_has_a_time_out(model: Any, held: Scheduler) -> None:
    waiting = held.submit(row(1), task="a")
    held.close(timeout_s=0.05)
    with pytest.raises(ClosedError, match="closed before this request ran"):
        waiting.result(LIMIT_S)


def test_a_with_block_drains_and_an_error_drops(model: Any, fake_model: ModuleType) -> None:
    with Scheduler(model, executors=1) as scheduler:
        future = scheduler.submit(row(1), task="a")
    assert future.done()
    with pytest.raises(ClosedError), scheduler:
        pass
    scheduler = Scheduler(model, executors=1)
    occupy(scheduler, model)
    waiting = scheduler.submit(row(2), task="a")
    threading.Timer(0.05, model.gate.set).start()
    with pytest.raises(ZeroDivisionError), scheduler:
        raise ZeroDivisionError
    with pytest.raises(ClosedError):
        waiting.result(LIMIT_S)


def test_no_thread_is_left(model: Any) -> None:
    before = set(threading.enumerate())
    Scheduler(model, executors=3).close()
    assert set(threading.enumerate()) <= before


def leave(_future: Future[Any]) -> None:
    sys.exit("a caller's callback ends what it takes for its own thread")


@pytest.fixture
def raised_in_threads(monkeypatch: pytest.MonkeyPatch) -> list[type[BaseException]]:
    """The kinds of what threads raise."""
    kinds: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda told: kinds.append(told.exc_type))
    return kinds


def test_a_callback_that_exits_keeps_no_other_caller_from_being_told(
    model: Any, make: Callable[..., Scheduler], raised_in_threads: list[type[BaseException]]
) -> None:
    scheduler = make(model)
    occupy(scheduler, model)
    futures = [scheduler.submit(row(value), task="a") for value in range(4)]
    listened: list[float] = []
    for future in futures[:2]:
        future.add_done_callback(leave)
    for future in futures:
        future.add_done_callback(lambda done: listened.append(done.result().output[0, 1]))
    model.gate.set()
    assert [future.result(LIMIT_S).output[0, 1] for future in futures] == [0, 1, 2, 3]
    assert scheduler.submit(row(9), task="b").result(LIMIT_S).output[0, 1] == 9, "the executor goes on"
    assert scheduler.metrics().outcomes["in_time"] >= 5
    assert listened == [2, 3]
    assert raised_in_threads == [SystemExit]


def test_a_callback_that_exits_when_its_request_expires_does_not_stop_the_clock(
    model: Any, make: Callable[..., Scheduler], raised_in_threads: list[type[BaseException]]
) -> None:
    scheduler = make(model)
    occupy(scheduler, model)
    late = [scheduler.submit(row(1), task="a", deadline_ms=allowed) for allowed in (40, 60)]
    late[0].add_done_callback(leave)
    for future in late:
        assert isinstance(future.exception(LIMIT_S), DeadlineError)
    model.gate.set()
    assert scheduler.submit(row(2), task="a").result(LIMIT_S).output[0, 1] == 2
    over = time.monotonic() + LIMIT_S
    while not raised_in_threads and time.monotonic() < over:
        time.sleep(0.001)  # the clock's thread tells of it after the futures
    assert raised_in_threads == [SystemExit]


def test_a_callback_that_exits_when_its_request_is_dropped_leaves_no_thread(
    model: Any, make: Callable[..., Scheduler]
) -> None:
    before = set(threading.enumerate())
    scheduler = make(model)
    occupy(scheduler, model)
    dropped = [scheduler.submit(row(value), task="a") for value in range(2)]
    dropped[0].add_done_callback(leave)
    threading.Timer(0.1, model.gate.set).start()
    with pytest.raises(SystemExit):
        scheduler.close(drain=False)
    assert all(isinstance(future.exception(LIMIT_S), ClosedError) for future in dropped)
    over = time.monotonic() + LIMIT_S
    while set(threading.enumerate()) - before and time.monotonic() < over:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_a_model_that_exits_is_its_callers_error(model: Any, make: Callable[..., Scheduler]) -> None:
    scheduler = make(model)

    def fails(_rows: NDArray[np.generic]) -> None:
        raise SystemExit(3)

    model.fails = fails
    assert isinstance(scheduler.submit(row(1), task="a").exception(LIMIT_S), SystemExit)
    model.fails = lambda rows: None
    assert scheduler.submit(row(2), task="a").result(LIMIT_S).output[0, 1] == 2


def test_a_loop_that_was_closed_while_its_coroutine_waited_for_a_place_does_no_harm(
    model: Any, make: Callable[..., Scheduler], raised_in_threads: list[type[BaseException]]
) -> None:
    scheduler = make(model, max_queue=1, when_full="block")
    occupy(scheduler, model)
    waiting = scheduler.submit(row(1), task="a")

    async def give_up() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(scheduler.infer(row(2), task="a"), 0.05)

    asyncio.run(give_up())
    model.gate.set()
    assert waiting.result(LIMIT_S).output[0, 1] == 1
    assert scheduler.submit(row(3), task="a").result(LIMIT_S).output[0, 1] == 3
    assert raised_in_threads == []


def test_callbacks_may_come_back_to_the_scheduler(model: Any, make: Callable[..., Scheduler]) -> None:
    scheduler = make(model)
    again: list[Any] = []
    first = scheduler.submit(row(1), task="a")
    first.add_done_callback(lambda done: again.append(scheduler.submit(row(2), task="b")))
    wait([first], LIMIT_S)
    scheduler.metrics()
    ended = threading.Event()
    last = scheduler.submit(row(3), task="a")
    last.add_done_callback(lambda done: (scheduler.close(timeout_s=LIMIT_S), ended.set()))
    assert ended.wait(LIMIT_S)
    assert again[0].result(LIMIT_S).output.tolist() == [[1, 2]]


def test_copies_are_refused(model: Any, make: Callable[..., Scheduler]) -> None:
    scheduler = make(model)
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="make one in each process"):
            copying(scheduler)


FORGOTTEN = """
import sys, numpy as np, te_runtime
model = te_runtime.load(sys.argv[1], threads=1)
scheduler = te_runtime.Scheduler(model, executors=2)
futures = [scheduler.submit(np.zeros((1, 6), np.float32), task="task_0") for _ in range(100)]
futures[0].result()
print("end of program")
"""

FORKED = """
import os, sys, warnings, numpy as np, te_runtime
warnings.simplefilter("ignore", DeprecationWarning)
x = np.zeros((1, 6), np.float32)
model = te_runtime.load(sys.argv[1], threads=1)
scheduler = te_runtime.Scheduler(model, executors=1)
scheduler.submit(x, task="task_0").result()
pid = os.fork()
if pid == 0:
    for use in (lambda: scheduler.submit(x, task="task_0"), scheduler.metrics, scheduler.__enter__):
        try:
            use()
        except te_runtime.ClosedError as error:
            assert "before this process was forked" in str(error), error
        else:
            raise SystemExit("no error in the child")
    scheduler.close()
    with te_runtime.load(sys.argv[1], threads=1) as own, te_runtime.Scheduler(own, executors=1) as again:
        again.submit(x, task="task_0").result()
    sys.exit(7)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
scheduler.submit(x, task="task_0").result()
scheduler.close()
print("end of program")
"""


FORKED_WHILE_MEASURING = """
import os, sys, threading, warnings, te_runtime
from te_runtime import forking
from te_runtime.session import open_session
import te_runtime.executor
warnings.simplefilter("ignore", DeprecationWarning)
model = te_runtime.load(sys.argv[1], threads=1)
loading, children = threading.Event(), []
def fork():
    loading.wait()
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    children.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
forker = threading.Thread(target=fork)
forker.start()
def slowly(*arguments, **options):  # a fork is waited for before the first tail is loaded
    loading.set()
    while not forking._gate._forking:
        pass
    return open_session(*arguments, **options)
te_runtime.executor.open_session = slowly
te_runtime.Scheduler(model, executors=2).close()
forker.join()
assert children == [7], children
print("end of program")
"""


@pytest.mark.parametrize(
    "program",
    [FORGOTTEN, FORKED, FORKED_WHILE_MEASURING],
    ids=["forgotten", "forked", "forked while measuring"],
)
def test_processes_end(pristine: Path, program: str) -> None:
    if "os.fork" in program and not hasattr(__import__("os"), "fork"):
        pytest.skip("needs os.fork, which Linux and macOS have")
    done = subprocess.run(
        [sys.executable, "-c", program, str(pristine)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "end of program\n"), done.stderr
    assert done.stderr == ""


# --- many threads ------------------------------------------------------------------------------------------------


def test_every_request_of_many_threads_ends_once(
    fake_model: ModuleType, make: Callable[..., Scheduler]
) -> None:
    models = [fake_model.FakeModel(name="one"), fake_model.FakeModel(name="two")]
    scheduler = make(models, max_queue=64, max_batch=16, max_delay_ms=0.2)
    per_thread, threads = 400, 6
    ended: list[int] = [0] * threads
    seen: list[str] = []
    wrong: list[tuple[str, float, object]] = []

    def client(number: int) -> None:
        rng = random.Random(number)
        for _ in range(per_thread):
            value = fake_model.POISON if rng.random() < 0.02 else float(rng.randrange(1000))
            task = rng.choice("abc")
            try:
                future = scheduler.submit(
                    row(value),
                    task=task,
                    priority=rng.randrange(100),
                    deadline_ms=rng.choice([None, 0.5, 5.0, 1000.0]),
                )
            except (QueueFullError, DeadlineError) as error:
                ended[number] += 1
                seen.append(type(error).__name__)
                continue
            if rng.random() < 0.1:
                future.cancel()
            try:
                answer = future.result(LIMIT_S)
                if answer.output.tolist() != [["abc".index(task), value]]:
                    wrong.append((task, value, answer))
                seen.append("answered")
            except (DeadlineError, CancelledError, ArithmeticError) as error:
                if isinstance(error, ArithmeticError) and value != fake_model.POISON:
                    wrong.append((task, value, error))
                seen.append(type(error).__name__)
            ended[number] += 1

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(client, range(threads)))
    scheduler.close()
    assert ended == [per_thread] * threads
    assert wrong == []
    metrics = scheduler.metrics()
    assert metrics.accepted + sum(metrics.refused.values()) == per_thread * threads
    assert sum(metrics.outcomes.values()) == metrics.accepted
    assert (metrics.queue_length, metrics.running) == (0, 0)
    assert seen.count("answered") == metrics.outcomes["in_time"] + metrics.outcomes["late"]
    assert {entry.state for entry in metrics.executors} == {"live"}


@pytest.fixture(autouse=True)
def _no_thread_died(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An exception that ends a thread of the scheduler's is a failure of the test."""
    died: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda told: died.append(repr(told.exc_value)))
    yield
    assert died == []

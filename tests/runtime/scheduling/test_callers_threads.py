"""A caller who waits for a batch of his alone runs it himself, as long as its executor's thread has not begun.

To have that thread come too late whenever a test wants it, it is kept in the callback of an earlier request: by then its
executor is free for the next batch.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitTimeoutError
from contextlib import suppress
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from te_runtime import Prediction, Scheduler, StallError
from te_runtime.scheduling import scheduler as scheduler_module

LIMIT_S = 30
ROW = np.full((1, 2), 7, dtype=np.float32)


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Lets the executors' threads come back from their callbacks."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def late_thread(make: Callable[..., Scheduler], release: threading.Event) -> Callable[..., Scheduler]:
    """Makes a scheduler whose executors are idle, and whose threads are not there until `release` is set."""

    def build(models: list[Any], **options: Any) -> Scheduler:
        scheduler = make(models, **options)
        for model in models:
            model.gate.clear()
        waiting = [scheduler.submit(ROW, task="a") for _ in models]  # one for each, whichever is the first
        arrived = [threading.Event() for _ in models]
        for model, future, event in zip(models, waiting, arrived, strict=True):
            assert model.entered.wait(LIMIT_S)

            def stay(_: object, event: threading.Event = event) -> None:
                event.set()
                assert release.wait(LIMIT_S)

            future.add_done_callback(stay)
        for model in models:
            model.gate.set()
        for event in arrived:
            assert event.wait(LIMIT_S)
        for model in models:
            model.batches.clear()
        return scheduler

    return build


@pytest.fixture
def hold_back(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[threading.Event, threading.Event]]:
    """Has batches told late from its call on: one sets the first event, and is told once the second is set."""

    def begin() -> tuple[threading.Event, threading.Event]:
        telling, tell = threading.Event(), threading.Event()
        answer_all = scheduler_module.answer_all

        def answer_late(*arguments: Any) -> None:
            telling.set()
            assert tell.wait(LIMIT_S)
            answer_all(*arguments)

        monkeypatch.setattr(scheduler_module, "answer_all", answer_late)
        return telling, tell

    return begin


@pytest.fixture
def caller() -> Iterator[ThreadPoolExecutor]:
    """A thread that is not the main one."""
    with ThreadPoolExecutor(1, thread_name_prefix="caller") as pool:
        yield pool


def note_threads(model: Any) -> list[str]:
    """The names of the threads that run the model's batches from now on."""
    names: list[str] = []
    model.fails = lambda rows: names.append(threading.current_thread().name)
    return names


def test_who_waits_runs_his_own_batch(
    model: Any, late_thread: Callable[..., Scheduler], caller: ThreadPoolExecutor
) -> None:
    scheduler = late_thread([model])
    names = note_threads(model)

    def ask(task: str) -> Prediction:
        answer: Prediction = scheduler.submit(ROW, task=task, deadline_ms=LIMIT_S * 1000).result()
        return answer

    assert [caller.submit(ask, task).result(LIMIT_S).output.tolist() for task in "bca"] == [
        [[1, 7]],
        [[2, 7]],
        [[0, 7]],
    ]
    assert names == ["caller_0"] * 3
    metrics = scheduler.metrics()
    assert (metrics.accepted, metrics.outcomes["in_time"]) == (4, 3), "the first one is still being told"
    assert metrics.running == 0
    assert metrics.executors[0].batches == 4
    assert metrics.executors[0].utilization > 0


def test_several_rows_and_tasks_of_one_caller(
    model: Any, late_thread: Callable[..., Scheduler], caller: ThreadPoolExecutor
) -> None:
    scheduler = late_thread([model])
    names = note_threads(model)
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    found = caller.submit(lambda: scheduler.submit(x, tasks=["c", "a"]).result()).result(LIMIT_S)
    assert {task: answer.output.tolist() for task, answer in found.items()} == {
        "c": [[2, 0], [2, 2], [2, 4]],
        "a": [[0, 0], [0, 2], [0, 4]],
    }
    assert list(found) == ["c", "a"]
    assert names == ["caller_0"]


@pytest.mark.parametrize("how", ["a time-out", "the main thread", "a device"])
def test_who_cannot_run_it_waits_for_the_executor(
    model: Any,
    late_thread: Callable[..., Scheduler],
    caller: ThreadPoolExecutor,
    release: threading.Event,
    how: str,
) -> None:
    """A time-out must be kept, signal handlers raise in the main thread, and a device may hang."""
    if how == "a device":
        model.provider = "cuda"
    scheduler = late_thread([model])
    names = note_threads(model)
    future = scheduler.submit(ROW, task="b")
    if how == "a time-out":
        with pytest.raises(WaitTimeoutError):
            caller.submit(future.result, 0.05).result(LIMIT_S)
    assert names == []
    if how == "the main thread":
        threading.Timer(0.05, release.set).start()
        assert future.result().output.tolist() == [[1, 7]]
    else:
        waiting = caller.submit(future.result) if how == "a device" else future
        release.set()
        answer = waiting.result(LIMIT_S)
        assert answer.output.tolist() == [[1, 7]]
    assert names == [f"te_runtime-{scheduler.metrics().executors[0].name}"]


def test_only_he_runs_a_batch_who_is_alone_in_it(
    model: Any, late_thread: Callable[..., Scheduler], caller: ThreadPoolExecutor, release: threading.Event
) -> None:
    scheduler = late_thread([model])
    names = note_threads(model)
    entered, go = threading.Event(), threading.Event()

    def hold(rows: NDArray[np.generic]) -> None:
        names.append(threading.current_thread().name)
        entered.set()
        assert go.wait(LIMIT_S)

    model.fails = hold
    first = caller.submit(lambda: scheduler.submit(ROW, task="a").result())
    assert entered.wait(LIMIT_S)
    others = [scheduler.submit(ROW, task=task) for task in "bc"]  # they wait, and will run together
    go.set()
    assert first.result(LIMIT_S).output.tolist() == [[0, 7]]
    waiting = caller.submit(others[0].result)
    release.set()
    assert waiting.result(LIMIT_S).output.tolist() == [[1, 7]]
    assert others[1].result(LIMIT_S).output.tolist() == [[2, 7]]
    assert names == ["caller_0", "te_runtime-cpu-0"]
    assert model.batches[1:] == [{"b": 1, "c": 1}]


def test_a_callback_may_wait_for_another_request(model: Any, make: Callable[..., Scheduler]) -> None:
    """It runs in the only executor's thread, which could not run what it waits for."""
    scheduler = make(model)
    model.gate.clear()
    first = scheduler.submit(ROW, task="a")
    assert model.entered.wait(LIMIT_S)
    second: list[Any] = []
    done = threading.Event()

    def ask_again(_: object) -> None:
        second.append(scheduler.submit(ROW, task="b").result())
        done.set()

    first.add_done_callback(ask_again)
    model.gate.set()
    assert done.wait(LIMIT_S)
    assert second[0].output.tolist() == [[1, 7]]


def test_what_fails_in_the_callers_thread_is_held_against_no_executor(
    fake_model: ModuleType,
    late_thread: Callable[..., Scheduler],
    caller: ThreadPoolExecutor,
    release: threading.Event,
) -> None:
    """It may be his thread's fault: the executor's own runs the batch as if nobody had."""
    models = [fake_model.FakeModel(name=name) for name in "xy"]
    scheduler = late_thread(models)
    tried: list[str] = []

    def fails(rows: NDArray[np.generic]) -> None:
        tried.append(threading.current_thread().name)
        if len(tried) == 1:
            release.set()
            raise ArithmeticError("once")

    for model in models:
        model.fails = fails
    waiting = caller.submit(lambda: scheduler.submit(ROW, task="b").result())
    assert waiting.result(LIMIT_S).output.tolist() == [[1, 7]]
    assert tried[0] == "caller_0"
    assert len(tried) == 2
    assert tried[1].startswith("te_runtime-cpu-")
    assert [entry.state for entry in scheduler.metrics().executors] == ["live", "live"]


def test_a_poisoned_request_of_the_callers_own(
    model: Any,
    fake_model: ModuleType,
    late_thread: Callable[..., Scheduler],
    caller: ThreadPoolExecutor,
    release: threading.Event,
) -> None:
    """The executor's thread tries it twice, as any other."""
    scheduler = late_thread([model])
    names = note_threads(model)
    x = np.full((1, 2), fake_model.POISON, dtype=np.float32)
    waiting = caller.submit(lambda: scheduler.submit(x, task="a").exception())
    over = time.monotonic() + LIMIT_S
    while not names and time.monotonic() < over:
        time.sleep(0.001)
    release.set()
    error = waiting.result(LIMIT_S)
    assert isinstance(error, ArithmeticError)
    assert isinstance(error.__cause__, ArithmeticError)
    assert names == ["caller_0", "te_runtime-cpu-0", "te_runtime-cpu-0"]
    assert scheduler.submit(ROW, task="a").result(LIMIT_S).output.tolist() == [[0, 7]]


def test_what_is_sent_to_the_callers_thread_reaches_him(
    model: Any,
    late_thread: Callable[..., Scheduler],
    caller: ThreadPoolExecutor,
    release: threading.Event,
) -> None:
    """As while he sleeps; his request goes on without him."""
    scheduler = late_thread([model])

    def fails(rows: NDArray[np.generic]) -> None:
        if threading.current_thread().name == "caller_0":
            raise KeyboardInterrupt("sent to this thread")

    model.fails = fails
    future = scheduler.submit(ROW, task="a")
    with pytest.raises(KeyboardInterrupt, match="sent to this thread"):
        caller.submit(future.result).result(LIMIT_S)
    assert not future.done()
    release.set()
    assert future.result(LIMIT_S).output.tolist() == [[0, 7]]
    assert scheduler.metrics().executors[0].state == "live"


def test_what_fails_in_the_callers_thread_after_a_hasty_close_ends(
    model: Any, late_thread: Callable[..., Scheduler], caller: ThreadPoolExecutor
) -> None:
    """The executor's thread takes nothing more by then."""
    scheduler = late_thread([model])
    model.gate.clear()

    def fails(rows: NDArray[np.generic]) -> None:
        raise ArithmeticError("late")

    model.fails = fails
    waiting = caller.submit(scheduler.submit(ROW, task="a").exception)
    assert model.entered.wait(LIMIT_S)
    scheduler.close(timeout_s=0)
    model.gate.set()
    assert isinstance(waiting.result(LIMIT_S), ArithmeticError)
    assert scheduler.metrics().outcomes["failed"] == 1


def test_a_caller_deep_down_leaves_it_to_the_executor(
    model: Any,
    late_thread: Callable[..., Scheduler],
    caller: ThreadPoolExecutor,
    release: threading.Event,
) -> None:
    """Near Python's recursion limit the scheduler's own steps could fail midway."""
    scheduler = late_thread([model])
    names = note_threads(model)
    futures = []

    def descend(calls: int, future: Future[Any]) -> None:
        if calls:
            descend(calls - 1, future)
        else:
            future.result()

    def overflow() -> None:
        for calls in range(sys.getrecursionlimit() - 60, sys.getrecursionlimit()):
            futures.append(scheduler.submit(ROW, task="a"))
            with suppress(RecursionError):
                descend(calls, futures[-1])

    waiting = caller.submit(overflow)
    release.set()
    waiting.result(LIMIT_S)
    assert all(future.exception(LIMIT_S) is None for future in futures)
    assert set(names) == {"te_runtime-cpu-0"}
    assert scheduler.metrics().executors[0].state == "live"


def test_nobody_runs_another_callers_batch(
    model: Any,
    make: Callable[..., Scheduler],
    caller: ThreadPoolExecutor,
    hold_back: Callable[[], tuple[threading.Event, threading.Event]],
) -> None:
    """His own was run meanwhile, and is about to be answered; the next lies in the inbox."""
    scheduler = make(model)
    telling, tell = hold_back()
    names = note_threads(model)
    first = scheduler.submit(ROW, task="a")
    assert telling.wait(LIMIT_S)
    second = scheduler.submit(ROW, task="b")
    waiting = caller.submit(first.result)
    with pytest.raises(WaitTimeoutError):
        waiting.result(0.05)
    assert len(names) == 1
    tell.set()
    assert waiting.result(LIMIT_S).output.tolist() == [[0, 7]]
    assert second.result(LIMIT_S).output.tolist() == [[1, 7]]
    assert set(names) == {"te_runtime-cpu-0"}


def test_close_waits_until_a_caller_has_told_his_answer(
    model: Any,
    late_thread: Callable[..., Scheduler],
    caller: ThreadPoolExecutor,
    release: threading.Event,
    hold_back: Callable[[], tuple[threading.Event, threading.Event]],
) -> None:
    """As it waits for an executor's thread: once it is back every future is done, and counted."""
    scheduler = late_thread([model])
    telling, tell = hold_back()
    future = scheduler.submit(ROW, task="a")
    waiting = caller.submit(future.result)
    assert telling.wait(LIMIT_S)
    release.set()
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    assert not future.done()
    tell.set()
    closing.join(LIMIT_S)
    assert not closing.is_alive()
    assert future.done()
    assert waiting.result(LIMIT_S).output.tolist() == [[0, 7]]
    metrics = scheduler.metrics()
    assert sum(metrics.outcomes.values()) == metrics.accepted


def test_what_stalls_in_the_callers_thread_is_given_up(
    model: Any, late_thread: Callable[..., Scheduler], caller: ThreadPoolExecutor
) -> None:
    scheduler = late_thread([model], stall_timeout_s=0.05)
    model.gate.clear()
    future = scheduler.submit(ROW, task="a")
    waiting = caller.submit(future.exception)
    assert isinstance(future.exception(LIMIT_S), StallError), "told to who waits with a time-out"
    assert scheduler.metrics().executors[0].state == "stuck"
    assert not waiting.done()
    model.gate.set()
    assert isinstance(waiting.result(LIMIT_S), StallError)
    assert scheduler.metrics().executors[0].state == "live"


def test_a_callback_may_want_a_lock_that_who_waits_holds(
    model: Any,
    late_thread: Callable[..., Scheduler],
    caller: ThreadPoolExecutor,
    release: threading.Event,
) -> None:
    """So callbacks run in an executor's thread, and with them the batch."""
    scheduler = late_thread([model])
    names = note_threads(model)
    lock, called = threading.Lock(), threading.Event()

    def call_back(_: object) -> None:
        with lock:
            called.set()

    def wait() -> Prediction:
        with lock:
            future = scheduler.submit(ROW, task="a")
            future.add_done_callback(call_back)
            answer: Prediction = future.result()
            return answer

    waiting = caller.submit(wait)
    release.set()
    assert waiting.result(LIMIT_S).output.tolist() == [[0, 7]]
    assert called.wait(LIMIT_S)
    assert names == ["te_runtime-cpu-0"]


def test_what_expired_while_nobody_ran_it_is_still_answered_late(
    model: Any, late_thread: Callable[..., Scheduler], caller: ThreadPoolExecutor
) -> None:
    """It was begun in time: whoever runs it, its answer is given."""
    scheduler = late_thread([model])
    future = scheduler.submit(ROW, task="a", deadline_ms=200)
    time.sleep(0.25)
    assert caller.submit(future.result).result(LIMIT_S).output.tolist() == [[0, 7]]
    assert scheduler.metrics().outcomes["late"] == 1


def test_closing_leaves_who_runs_his_own_batch_his_answer(
    model: Any, late_thread: Callable[..., Scheduler], caller: ThreadPoolExecutor, release: threading.Event
) -> None:
    scheduler = late_thread([model])
    model.gate.clear()
    waiting = caller.submit(lambda: scheduler.submit(ROW, task="a").result())
    assert model.entered.wait(LIMIT_S)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    model.gate.set()
    release.set()
    closing.join(LIMIT_S)
    assert not closing.is_alive()
    assert waiting.result(LIMIT_S).output.tolist() == [[0, 7]]


def test_nobody_takes_the_word_that_ends_the_thread(
    model: Any, late_thread: Callable[..., Scheduler], caller: ThreadPoolExecutor, release: threading.Event
) -> None:
    """A batch given up before any thread took it lies before that word, and goes with it."""
    scheduler = late_thread([model], stall_timeout_s=0.02)
    futures = [scheduler.submit(ROW, task="a")]
    assert isinstance(futures[0].exception(LIMIT_S), StallError)
    scheduler.close(timeout_s=0)
    before = len(model.batches)
    assert isinstance(caller.submit(futures[0].exception).result(LIMIT_S), StallError)
    assert len(model.batches) == before
    release.set()
    over = time.monotonic() + LIMIT_S
    while executor_lives() and time.monotonic() < over:
        time.sleep(0.01)
    assert not executor_lives()


def executor_lives() -> bool:
    return any(thread.name == "te_runtime-cpu-0" for thread in threading.enumerate())


def test_a_future_is_part_of_no_cycle(model: Any, make: Callable[..., Scheduler]) -> None:
    """What nobody holds is gone at once: a million futures would wait for the garbage collector."""
    scheduler = make(model)
    gc.disable()
    try:
        future = scheduler.submit(ROW, task="a")
        future.result(LIMIT_S)
        scheduler.close()
        gone = weakref.ref(future)
        del future
        assert gone() is None
    finally:
        gc.enable()

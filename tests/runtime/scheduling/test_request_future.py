"""RequestFuture beside concurrent.futures.Future: whoever holds one sees no difference."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from te_runtime.scheduling.request import Request
from te_runtime.scheduling.request_future import RequestFuture, answer_all

MakeRequest = Callable[..., Request]

ERROR = ValueError("what the graph said")
STEPS = (
    "cancel",
    "cancelled",
    "running",
    "done",
    "result",
    "exception",
    "callback",
    "failing callback",
    "set_running",
    "set_result",
    "set_exception",
    "wait",
    "as_completed",
    "repr",
)


def happened(future: Future[object], step: str, told: list[object]) -> object:
    """What a step gives or raises, in words that two futures can be compared by."""
    try:
        match step:
            case "cancel" | "cancelled" | "running" | "done":
                return getattr(future, step)()
            case "result" | "exception":
                return getattr(future, step)(timeout=0)
            case "callback":
                number = len(told)
                told.append("added")
                return future.add_done_callback(lambda ended: told.append((number, ended.done())))
            case "failing callback":
                return future.add_done_callback(lambda _ended: 1 / 0)
            case "set_running":
                return future.set_running_or_notify_cancel()
            case "set_result":
                return future.set_result(5)
            case "set_exception":
                return future.set_exception(ERROR)
            case "wait":
                return len(concurrent.futures.wait([future], timeout=0).done)
            case "as_completed":
                return len(list(concurrent.futures.as_completed([future], timeout=0)))
            case _:
                return repr(future).split(" state=")[1]
    except BaseException as error:  # noqa: BLE001 - the kind is what is compared
        return type(error)


@settings(deadline=None, max_examples=400)
@given(st.lists(st.sampled_from(STEPS), max_size=12))
def test_whatever_is_done_to_it_it_behaves_as_a_future(steps: list[str]) -> None:
    own, plain = RequestFuture(), Future[object]()
    told: tuple[list[object], list[object]] = ([], [])
    for step in steps:
        assert happened(own, step, told[0]) == happened(plain, step, told[1])
    assert told[0] == told[1]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.sampled_from(STEPS[:8] + STEPS[11:]), max_size=6), max_size=5))
def test_answered_together_is_as_answered_one_by_one(steps: list[list[str]]) -> None:
    """Whether they were watched, listened to or neither."""
    own = [RequestFuture() for _ in steps]
    plain = [Future[object]() for _ in steps]
    told: tuple[list[object], list[object]] = ([], [])
    for one, other, taken in zip(own, plain, steps, strict=True):
        assert one.set_running_or_notify_cancel()
        assert other.set_running_or_notify_cancel()
        for step in taken:
            assert happened(one, step, told[0]) == happened(other, step, told[1])
    answer_all(own, range(len(own)))
    for number, other in enumerate(plain):
        other.set_result(number)
    assert sorted(map(str, told[0])) == sorted(map(str, told[1]))
    assert [one.result() for one in own] == [other.result() for other in plain] == list(range(len(own)))
    assert all(one.done() and one.exception() is None for one in own)


def test_a_cancelled_future_takes_its_request_back_once(make_request: MakeRequest) -> None:
    request, told = make_request(), []
    request.future.request, request.future.withdraw = request, told.append
    assert request.future.cancel()
    assert request.future.cancel()
    assert told == [request]


def test_a_running_future_cannot_be_cancelled_and_forgets_its_request(make_request: MakeRequest) -> None:
    request, told = make_request(), []
    future = request.future
    future.request, future.withdraw = request, told.append
    assert future.set_running_or_notify_cancel()
    assert not future.cancel()
    assert told == []
    assert future.request is None
    future.set_result(3)
    assert concurrent.futures.wait([future], timeout=0).done == {future}


def test_a_future_of_nobody_can_be_cancelled() -> None:
    assert RequestFuture().cancel()


def test_an_attribute_that_no_future_has_is_missed_by_name() -> None:
    with pytest.raises(AttributeError, match="'RequestFuture' object has no attribute 'reslut'"):
        _ = RequestFuture().reslut  # type: ignore[attr-defined]


def test_the_plain_case_makes_no_condition() -> None:
    """What all this is for."""
    future = RequestFuture()
    assert future.set_running_or_notify_cancel()
    assert not future.done()
    answer_all([future], [4])
    assert future.done()
    assert future.result() == 4
    assert vars(future).keys() <= {"_state", "_result", "request"}


def test_watchers_of_every_kind_are_told_while_batches_are_answered() -> None:
    """Threads wait, iterate, poll, listen and cancel while others answer: each future ends once, nobody waits on."""
    rounds, size = 60, 12
    rng = random.Random(0)
    ended = itertools.count()
    seen: list[int] = []
    errors: list[BaseException] = []

    def watch(futures: list[RequestFuture], how: int) -> None:
        try:
            if how == 0:
                assert not concurrent.futures.wait(futures, timeout=20).not_done
            elif how == 1:
                found = list(concurrent.futures.as_completed(futures, timeout=20))
                assert len(found) == len(set(found)) == len(futures)
            elif how == 2:
                for future in futures:
                    assert isinstance(future.exception(20) if not future.cancelled() else None, type(None))
            elif how == 3:
                for future in futures:
                    future.add_done_callback(lambda _future: next(ended))
            else:
                seen.append(sum(future.cancel() for future in futures[::3]))
        except concurrent.futures.CancelledError:
            pass
        except BaseException as error:  # noqa: BLE001 - told below, in the test's own thread
            errors.append(error)

    for number in range(rounds):
        futures = [RequestFuture() for _ in range(size)]
        threads = [threading.Thread(target=watch, args=(futures, how)) for how in (0, 1, 1, 2, 3, 4)]
        rng.shuffle(threads)
        for thread in threads[:4]:
            thread.start()
        running = [future for future in futures if future.set_running_or_notify_cancel()]
        for thread in threads[4:]:
            thread.start()
        time.sleep(rng.choice((0, 0, 1e-4)))
        answer_all(running, itertools.repeat(number, len(running)))
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert not errors
        assert all(future.done() for future in futures)
        assert all(future.result() == number for future in running)
    assert next(ended) == rounds * size
    assert len(seen) == rounds


def test_coroutines_await_it() -> None:
    async def ask() -> list[object]:
        futures = [RequestFuture() for _ in range(3)]
        waiting = [asyncio.ensure_future(asyncio.wrap_future(future)) for future in futures]
        await asyncio.sleep(0)
        futures[2].cancel()
        answer_all(futures[:2], [1, 2])
        return await asyncio.gather(*waiting, return_exceptions=True)

    one, two, cancelled = asyncio.run(ask())
    assert (one, two) == (1, 2)
    assert isinstance(cancelled, asyncio.CancelledError)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_in_the_middle_of_an_answer_leaves_the_child_a_lock() -> None:
    from te_runtime.scheduling import request_future

    with request_future._LOCK:
        child = os.fork()
        if child == 0:
            future = RequestFuture()
            future.set_running_or_notify_cancel()
            answer_all([future], [1])
            os._exit(0 if future.result() == 1 else 1)
    for _ in range(200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits for a lock that nobody holds")
    assert os.waitstatus_to_exitcode(status) == 0

"""The dispatcher event by event, where the simulation's rules do not say it all."""

from __future__ import annotations

import concurrent.futures
import gc
import weakref
from collections.abc import Callable

import pytest

from te_runtime.errors import ClosedError, DeadlineError, QueueFullError, StallError
from te_runtime.scheduling.dispatcher import Assignment, Dispatcher, Limits
from te_runtime.scheduling.latency_model import LatencyModel
from te_runtime.scheduling.request import Request
from te_runtime.scheduling.resource_pool import Resource, ResourcePool

MakeRequest = Callable[..., Request]
MS = 1_000_000
STALL = 100 * MS


def dispatcher(*factors: float, max_batch: int = 4, max_delay_ns: int = 0, max_queue: int = 10) -> Dispatcher:
    """Executors on which a pass takes a millisecond, times a factor."""
    resources = [
        Resource(
            f"cpu-{number}",
            LatencyModel(
                dict.fromkeys((1, 2, 4), factor * 0.99 * MS), {"a": 10_000 * factor, "b": 10_000 * factor}
            ),
        )
        for number, factor in enumerate(factors or (1.0,))
    ]
    return Dispatcher(ResourcePool(resources), Limits(max_batch, max_delay_ns, max_queue, 1000 * MS, STALL))


def begin(one: Dispatcher, request: Request, now_ns: int = 0) -> list[Assignment]:
    one.submit(request, now_ns)
    return one.dispatch(now_ns)


def test_a_closed_one_lets_nothing_in(make_request: MakeRequest) -> None:
    one = dispatcher()
    one.is_closed = True
    with pytest.raises(ClosedError):
        one.submit(make_request(), 0)
    assert one.is_quiet


def test_a_full_queue_lets_nothing_in(make_request: MakeRequest) -> None:
    one = dispatcher(max_queue=2)
    begin(one, make_request())
    one.submit(make_request(), 0)
    one.submit(make_request(), 0)
    with pytest.raises(QueueFullError) as caught:
        one.submit(make_request(), 0)
    assert caught.value.capacity == 2
    assert len(one.queue) == 2


def test_who_could_not_be_in_time_is_told_when_it_would_be(make_request: MakeRequest) -> None:
    one = dispatcher()
    begin(one, make_request())
    late = make_request(submitted_ns=MS // 2, deadline_ns=2 * MS - 1)
    with pytest.raises(DeadlineError) as caught:
        one.submit(late, MS // 2)
    assert caught.value.allowed_ms == pytest.approx(1.5, abs=1e-5)
    assert caught.value.predicted_ms == pytest.approx(1.5, abs=1e-5)
    assert caught.value.waited_ms is None
    assert not late.is_queued
    one.submit(make_request(submitted_ns=MS // 2, deadline_ns=2 * MS), MS // 2)


def test_what_expires_in_the_queue_is_told_how_long_it_waited(make_request: MakeRequest) -> None:
    one = dispatcher()
    [running] = begin(one, make_request())
    waiting = make_request(submitted_ns=0, deadline_ns=3 * MS)
    one.submit(waiting, 0)
    assert one.next_tick_ns() == 3 * MS
    assert one.tick(3 * MS - 1) == []
    assert not one.endings
    assert one.tick(3 * MS) == []
    [(request, outcome, error)] = one.endings
    assert (request, outcome) == (waiting, "expired")
    assert isinstance(error, DeadlineError)
    assert (error.allowed_ms, error.waited_ms, error.predicted_ms) == (3.0, 3.0, None)
    assert one.next_tick_ns() == STALL
    assert one.completed(running, 4 * MS)


@pytest.mark.parametrize("waits_until_ns", [3 * MS - 1, 3 * MS])
def test_at_its_deadline_a_request_is_not_begun_any_more(
    make_request: MakeRequest, waits_until_ns: int
) -> None:
    """Although nobody ticked."""
    one = dispatcher()
    [running] = begin(one, make_request())
    waiting = make_request(deadline_ns=3 * MS)
    one.submit(waiting, 0)
    one.completed(running, waits_until_ns)
    found = one.dispatch(waits_until_ns)
    assert [assignment.batch.requests for assignment in found] == (
        [[waiting]] if waits_until_ns < 3 * MS else []
    )
    assert [ending.outcome for ending in one.endings] == ([] if found else ["expired"])


def test_a_cancelled_request_is_done_for_whoever_waits_for_it(make_request: MakeRequest) -> None:
    one = dispatcher()
    begin(one, make_request())
    waiting = make_request()
    waiting.future.request, waiting.future.withdraw = waiting, one.cancel
    one.submit(waiting, 0)
    assert waiting.future.cancel()
    assert [(ending.outcome, ending.error) for ending in one.endings] == [("cancelled", None)]
    assert concurrent.futures.wait([waiting.future], timeout=0).done == {waiting.future}
    assert len(one.queue) == 0
    assert waiting.future.cancel()
    assert not one.cancel(waiting)
    assert len(one.endings) == 1


def test_a_request_cancelled_while_it_is_taken_out_is_not_run(make_request: MakeRequest) -> None:
    """Its caller has cancelled the future, and the word has not come yet."""
    one = dispatcher()
    requests = [make_request(tasks=("a",)), make_request(tasks=("b",), rows=2)]
    for request in requests:
        one.submit(request, 0)
    requests[0].future.cancel()
    [assignment] = one.dispatch(0)
    assert assignment.batch.requests == [requests[1]]
    assert (assignment.batch.tasks, assignment.batch.rows) == ({"b"}, 2)
    assert [(ending.request, ending.outcome) for ending in one.endings] == [(requests[0], "cancelled")]
    assert not one.cancel(requests[0])


def test_a_running_request_cannot_be_cancelled(make_request: MakeRequest) -> None:
    one = dispatcher()
    request = make_request()
    request.future.request, request.future.withdraw = request, one.cancel
    begin(one, request)
    assert not request.future.cancel()
    assert not one.endings


def test_a_request_does_not_live_as_long_as_its_future(make_request: MakeRequest) -> None:
    """A caller may keep its future; the request holds its rows."""

    class Rows:
        """What can be watched, unlike a tuple."""

    one = dispatcher()
    request = make_request(data=Rows())
    request.future.request, request.future.withdraw = request, one.cancel
    future = request.future
    [assignment] = begin(one, request)
    one.completed(assignment, MS)
    rows = weakref.ref(request.data)
    gc.disable()
    try:
        del request, assignment
        assert rows() is None
    finally:
        gc.enable()
    assert not future.done()


def test_answers_of_a_batch_that_was_given_up_are_ignored(make_request: MakeRequest) -> None:
    one = dispatcher(1.0)
    request = make_request()
    [assignment] = begin(one, request)
    assert one.next_tick_ns() == STALL
    one.tick(STALL - 1)
    assert not one.endings
    one.tick(STALL)
    [(_, outcome, error)] = one.endings
    assert outcome == "failed"
    assert isinstance(error, StallError)
    assert (error.executor, error.limit_s) == ("cpu-0", 0.1)
    assert one.is_quiet
    assert one.running == 0
    expected = assignment.resource.latency.expect({"a"}, 1)
    assert not one.completed(assignment, 2 * STALL)
    assert assignment.resource.state == "live"
    assert assignment.resource.error is None
    assert assignment.resource.batches == 0
    assert assignment.resource.busy_ns == 2 * STALL
    assert assignment.resource.latency.expect({"a"}, 1) == expected, (
        "a stall is not what batches usually take"
    )


def test_an_executor_that_comes_back_late_with_an_error_is_live_again(make_request: MakeRequest) -> None:
    one = dispatcher(1.0)
    [assignment] = begin(one, make_request())
    one.tick(STALL)
    one.failed(assignment, ValueError("late"), 2 * STALL)
    assert len(one.endings) == 1
    assert assignment.resource.is_idle
    assert begin(one, make_request(), 2 * STALL)


def test_what_failed_is_tried_alone_and_elsewhere(make_request: MakeRequest) -> None:
    one = dispatcher(1.0, 1.5)
    requests = [make_request(tasks=(task,)) for task in "ab"]
    for request in requests:
        one.submit(request, 0)
    [first] = one.dispatch(0)
    assert (first.resource.name, first.batch.requests) == ("cpu-0", requests)
    one.failed(first, ValueError("no"), MS)
    assert first.resource.state == "suspect"
    assert one.running == 2
    assert not one.is_quiet
    [second] = one.dispatch(MS)
    assert (second.resource.name, second.batch.requests) == ("cpu-1", [requests[0]])
    assert one.completed(second, 2 * MS)
    assert first.resource.state == "suspect"
    [third] = one.dispatch(2 * MS)
    assert (third.resource.name, third.batch.requests) == ("cpu-1", [requests[1]])
    one.completed(third, 3 * MS)
    assert first.resource.state == "out"
    assert isinstance(first.resource.error, ValueError)
    assert one.is_quiet
    assert not one.endings


def test_an_executor_is_not_taken_out_while_one_of_its_requests_ended_untried(
    make_request: MakeRequest,
) -> None:
    one = dispatcher(1.0, 1.5)
    requests = [make_request(tasks=(task,), deadline_ns=10 * MS) for task in "ab"]
    for request in requests:
        one.submit(request, 0)
    [first] = one.dispatch(0)
    one.failed(first, ValueError("no"), MS)
    [second] = one.dispatch(MS)
    assert one.completed(second, 20 * MS) is True
    assert one.dispatch(20 * MS) == []
    assert [ending.outcome for ending in one.endings] == ["expired"]
    assert first.resource.state == "live"


def test_a_second_failure_names_the_first_as_its_cause(make_request: MakeRequest) -> None:
    one = dispatcher(1.0, 1.5)
    request = make_request()
    [first] = begin(one, request)
    errors = ValueError("first"), ValueError("second")
    one.failed(first, errors[0], MS)
    [second] = one.dispatch(MS)
    one.failed(second, errors[1], 2 * MS)
    [ending] = one.endings
    assert (ending.request, ending.outcome, ending.error) == (request, "failed", errors[1])
    assert errors[1].__cause__ is errors[0]
    assert [resource.state for resource in one.pool.resources] == ["live", "live"]


def test_that_a_suspect_succeeds_with_its_own_failure_does_not_speak_against_it(
    make_request: MakeRequest,
) -> None:
    """The other one hangs meanwhile, so the second try is on the suspect itself; then the other comes back."""
    one = dispatcher(1.0, 1.5)
    suspect, other = one.pool.resources
    [first] = begin(one, make_request())
    [hanging] = begin(one, make_request())
    assert (first.resource, hanging.resource) == (suspect, other)
    one.failed(first, ValueError("no"), MS)
    assert one.dispatch(MS) == []
    tries = one.tick(STALL)
    assert [assignment.resource for assignment in tries] == [suspect]
    one.completed(hanging, STALL + MS // 2)
    assert one.completed(tries[0], STALL + MS)
    assert suspect.state == "live"
    assert other.state == "live"


def test_after_dropping_what_fails_is_not_tried_again(make_request: MakeRequest) -> None:
    """The executors' threads end, so nothing would ever run it."""
    one = dispatcher(1.0, 1.5)
    request, waiting = make_request(), make_request()
    [first] = begin(one, request)
    begin(one, make_request())
    one.submit(waiting, 0)
    one.drop_waiting(lambda: ClosedError("closed"))
    assert [(ending.request, ending.outcome) for ending in one.endings] == [(waiting, "dropped")]
    error = ValueError("no")
    one.failed(first, error, MS)
    assert one.endings[1] == (request, "failed", error)
    assert one.dispatch(MS) == []
    with pytest.raises(ClosedError):
        one.submit(make_request(), MS)


def test_second_tries_that_wait_are_dropped_too(make_request: MakeRequest) -> None:
    one = dispatcher(1.0, 1.5)
    request = make_request()
    [first] = begin(one, request)
    [second] = begin(one, make_request())
    one.failed(first, ValueError("no"), MS // 2)
    assert one.dispatch(MS // 2) == []
    one.drop_waiting(lambda: ClosedError("closed"))
    assert [(ending.request, ending.outcome) for ending in one.endings] == [(request, "dropped")]
    one.completed(second, MS)
    assert one.is_quiet


def test_when_an_executor_is_out_the_queue_is_ordered_anew(make_request: MakeRequest) -> None:
    """With two executors a point is worth 2 ms, with one 1 ms: then the nearer deadline comes first."""
    one = dispatcher(1.0, 1.0, max_batch=1)
    [first] = begin(one, make_request())
    [second] = begin(one, make_request())
    urgent = make_request(priority=0.0, deadline_ns=100 * MS)
    valued = make_request(priority=10.0, deadline_ns=115 * MS)
    for request in (urgent, valued):
        one.submit(request, 0)
    assert list(one.queue) == [valued, urgent]
    one.failed(first, ValueError("no"), MS)
    assert one.completed(second, MS)
    [again] = one.dispatch(MS)
    one.completed(again, 2 * MS)
    assert one.pool.capacity == 1.0
    assert list(one.queue) == [urgent, valued]
    assert [assignment.batch.requests for assignment in one.dispatch(2 * MS)] == [[urgent]]
    later = make_request(priority=10.0, deadline_ns=109 * MS)
    one.submit(later, 2 * MS)
    assert list(one.queue) == [later, valued]


def test_a_refusal_relaxes_what_is_expected_of_the_idle_though_another_hangs(
    make_request: MakeRequest,
) -> None:
    one = dispatcher(1.0, 1.0)
    stuck, idle = one.pool.resources
    begin(one, make_request())
    [second] = one.tick(STALL)
    one.completed(second, STALL + MS)
    assert (stuck.state, idle.state) == ("stuck", "live")
    for _ in range(50):
        idle.latency.correct(("a",), 1, 1000.0 * MS)
    refused = 0
    now_ns = STALL + MS
    while refused < 1000:
        try:
            one.submit(make_request(submitted_ns=now_ns, deadline_ns=now_ns + 5 * MS), now_ns)
            break
        except DeadlineError:
            refused += 1
    assert 10 < refused < 200


def test_a_held_batch_asks_to_be_looked_at_again(make_request: MakeRequest) -> None:
    one = dispatcher(max_delay_ns=400_000, max_batch=4)
    one.pool.resources[0].latency._trunk = [0.2 * MS, 0.21 * MS, 0.23 * MS]
    now_ns = 0
    for _ in range(100):
        now_ns += 10_000
        one._gap.arrived(now_ns)
    assert begin(one, make_request(submitted_ns=now_ns), now_ns) == []
    moment = one.next_tick_ns()
    assert moment is not None
    assert now_ns < moment <= now_ns + 400_000
    [assignment] = one.tick(moment)
    assert len(assignment.batch.requests) == 1
    assert one.next_tick_ns() == moment + STALL

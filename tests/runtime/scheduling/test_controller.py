from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from te_runtime.scheduling.batch import Batch
from te_runtime.scheduling.controller import Controller
from te_runtime.scheduling.latency_model import LatencyModel
from te_runtime.scheduling.request import Request
from te_runtime.scheduling.request_queue import RequestQueue
from te_runtime.scheduling.resource_pool import Resource, ResourcePool

MakeRequest = Callable[..., Request]
TASKS = ("a", "b", "c")
NOW = 50_000


def resource(name: str = "one", factor: float = 1.0) -> Resource:
    """(100 + 10 · rows + 20 · tasks) · factor."""
    trunk = {1 << power: factor * (100.0 + 10 * (1 << power)) for power in range(4)}
    return Resource(name, LatencyModel(trunk, dict.fromkeys(TASKS, factor * 20.0)))


def busy(one: Resource, until_ns: int) -> Resource:
    one.batch, one.free_at_ns = Batch([], frozenset(), 1, 0, 100.0), until_ns
    return one


def predict(
    make_request: MakeRequest, waiting: list[Request], *resources: Resource, request: Request | None = None
) -> float:
    queue = RequestQueue(1_000_000)
    for one in waiting:
        queue.push(one)
    pool = ResourcePool(resources)
    return Controller(queue, pool, max_batch=8).predict_finish_ns(request or make_request(rank_ns=10), NOW)


def test_alone_it_takes_one_pass(make_request: MakeRequest) -> None:
    assert predict(make_request, [], resource()) == NOW + 130
    request = make_request(rows=4, tasks=TASKS)
    assert predict(make_request, [], resource(), request=request) == NOW + 200


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (1, 0, 140),
        (0, 5, 130),  # behind it in the order, though it may share a batch with them
        (7, 0, 200),
        (8, 0, 200 + 200),  # a full batch before its own, which more may join
        (23, 3, 3 * 200),
        (24, 0, 4 * 200),
    ],
)
def test_who_ranks_before_runs_first(
    make_request: MakeRequest, before: int, after: int, expected: int
) -> None:
    waiting = [make_request(rank_ns=1) for _ in range(before)] + [
        make_request(rank_ns=99) for _ in range(after)
    ]
    assert predict(make_request, waiting, resource()) == NOW + expected


def test_several_executors_share_the_passes(make_request: MakeRequest) -> None:
    waiting = [make_request(rank_ns=1) for _ in range(24)]
    assert predict(make_request, waiting, resource("one"), resource("two")) == NOW + 400
    assert predict(make_request, waiting, resource("one"), resource("two", 3.0)) == NOW + 600


def test_a_busy_executor_is_waited_for_where_that_is_sooner(make_request: MakeRequest) -> None:
    assert predict(make_request, [], busy(resource(), NOW + 500)) == NOW + 630
    assert predict(make_request, [], busy(resource(), NOW + 500), resource("two", 2.0)) == NOW + 260


def test_an_executor_that_hangs_is_not_counted_on(make_request: MakeRequest) -> None:
    assert predict(make_request, [], busy(resource(), NOW - 30_000)) == NOW + 30_001 + 130


def test_usual_deviations_are_allowed_for(make_request: MakeRequest) -> None:
    one = resource()
    one.latency.deviation = 0.25
    assert predict(make_request, [], one) == pytest.approx(NOW + 130 * 1.5)


def test_where_none_is_live_the_others_are_thought_of(make_request: MakeRequest) -> None:
    stuck = busy(resource(), NOW - 1_000)
    queue, pool = RequestQueue(9), ResourcePool([stuck])
    pool.change_state(stuck, "stuck")
    finish = Controller(queue, pool, max_batch=8).predict_finish_ns(make_request(), NOW)
    assert finish == NOW + 1_001 + 130


def walked(make_request: MakeRequest, free: list[int], full: list[float], passes: int) -> float:
    """The prediction by walking through every pass: each goes where it is done first."""
    for _ in range(passes):
        place = min(range(len(full)), key=lambda place: free[place] + full[place])
        free[place] += round(full[place])
    return min(start + latency for start, latency in zip(free, full, strict=True))


@settings(deadline=None, max_examples=80)
@given(
    executors=st.lists(
        st.tuples(st.sampled_from([1.0, 1.5, 2.0, 40.0]), st.integers(0, 3000)), min_size=1, max_size=4
    ),
    passes=st.integers(0, 60),
)
def test_passes_are_counted_as_if_walked_through(
    make_request: MakeRequest, executors: list[tuple[float, int]], passes: int
) -> None:
    resources = [
        busy(resource(str(number), factor), NOW + left) if left else resource(str(number), factor)
        for number, (factor, left) in enumerate(executors)
    ]
    waiting = [make_request(rank_ns=1) for _ in range(8 * passes)]
    free = [NOW + left for _, left in executors]
    full = [200.0 * factor for factor, _ in executors]
    found = predict(make_request, waiting, *resources, request=make_request(rank_ns=10, rows=8))
    assert found == pytest.approx(walked(make_request, free, full, passes), abs=0.01)


def test_a_prediction_needs_no_walk_through_a_long_queue(make_request: MakeRequest) -> None:
    """One through so many passes would not end within this test run."""
    queue = RequestQueue(10**15)
    queue.push(make_request(rank_ns=1))
    queue.rows = 8 * 10**12
    pool = ResourcePool([resource("one"), resource("two", 4.0)])
    finish = Controller(queue, pool, max_batch=8).predict_finish_ns(make_request(rank_ns=10), NOW)
    assert finish == pytest.approx(10**12 / (1 / 200 + 1 / 800), rel=0.2)


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("ask"), st.integers(1, 3), st.integers(0, 20)),
            st.tuples(st.just("wait"), st.integers(1, 400), st.just(0)),
            st.tuples(st.just("push"), st.integers(1, 3), st.integers(0, 20)),
            st.tuples(st.just("begin"), st.integers(0, 1), st.integers(1, 8)),
            st.tuples(st.just("end"), st.integers(0, 1), st.just(0)),
            st.tuples(st.just("stuck"), st.integers(0, 1), st.just(0)),
        ),
        max_size=40,
    )
)
@example([("begin", 0, 8), ("begin", 1, 8), ("ask", 1, 5), ("end", 0, 0), ("ask", 1, 5)])
@example([("begin", 0, 8), ("begin", 1, 8), ("ask", 1, 5), ("stuck", 0, 0), ("ask", 1, 5)])
def test_what_is_kept_of_predictions_is_what_would_be_predicted_anew(
    make_request: MakeRequest, steps: list[tuple[str, int, int]]
) -> None:
    queue, pool = RequestQueue(1000), ResourcePool([resource("one"), resource("two", 1.5)])
    controller = Controller(queue, pool, max_batch=8)
    now_ns = NOW
    for what, number, extra in steps:
        one = pool.resources[number % 2]
        if what == "wait":
            now_ns += number
        elif what == "push":
            queue.push(make_request(rows=number, rank_ns=extra, tasks=TASKS[: 1 + extra % 3]))
        elif what == "begin" and one.batch is None:
            pool.begin(one, Batch([], frozenset(), extra, now_ns, one.latency.expect_about(1, extra)))
        elif what == "end" and one.batch is not None:
            batch = one.batch
            pool.end(one, batch, now_ns)
            one.state = "live"
            controller.learn(one, batch, now_ns - batch.started_ns + 1)
        elif what == "stuck" and one.batch is not None:
            pool.change_state(one, "stuck")
        elif what == "ask":
            request = make_request(rows=number, rank_ns=extra)
            anew = Controller(queue, pool, max_batch=8).predict_finish_ns(request, now_ns)
            assert controller.predict_finish_ns(request, now_ns) == anew
            assert controller.predict_finish_ns(request, now_ns) == anew


def test_a_prediction_is_looked_up_while_every_executor_is_at_work(
    make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = busy(resource(), NOW + 500)
    controller = Controller(RequestQueue(9), ResourcePool([one]), max_batch=8)
    first = controller.predict_finish_ns(make_request(rank_ns=10), NOW)
    monkeypatch.setattr(LatencyModel, "expect_about", pytest.fail)
    assert controller.predict_finish_ns(make_request(rank_ns=10), NOW + 499) == first


def test_learning_corrects_the_executor_that_ran_and_keeps_the_score() -> None:
    one, two = resource("one"), resource("two")
    controller = Controller(RequestQueue(1), ResourcePool([one, two]), max_batch=8)
    batch = Batch([], frozenset({"a"}), 2, 0, 140.0)
    controller.learn(one, batch, 280)
    assert one.latency.expect(("a",), 2) == pytest.approx(140 + 0.1 * 140)
    assert two.latency.expect(("a",), 2) == pytest.approx(140)
    assert controller.mean_error == controller.mean_absolute_error == pytest.approx(0.05)
    controller.learn(two, batch, 70)
    assert controller.mean_error == pytest.approx(0.05 - 0.05 * 0.55)
    assert controller.mean_absolute_error == pytest.approx(0.05 + 0.05 * 0.45)

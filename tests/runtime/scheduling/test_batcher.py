from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from te_runtime.scheduling.batcher import ArrivalGap, Batcher
from te_runtime.scheduling.latency_model import LatencyModel
from te_runtime.scheduling.request import Request
from te_runtime.scheduling.request_queue import RequestQueue

MakeRequest = Callable[..., Request]
MS = 1_000_000
TASKS = ("a", "b", "c")


def model(fixed: float = 100.0, row: float = 10.0, tail: float = 20.0) -> LatencyModel:
    """fixed + row · rows + tail · tasks."""
    return LatencyModel(
        {1 << power: fixed + row * (1 << power) for power in range(7)}, dict.fromkeys(TASKS, tail)
    )


def batcher(max_batch: int = 8, max_delay_ns: int = MS) -> Batcher:
    return Batcher(max_batch=max_batch, max_delay_ns=max_delay_ns)


def test_without_deadlines_a_batch_is_as_large_as_may_be(make_request: MakeRequest) -> None:
    waiting = [
        make_request(tasks=(task,), rows=rows) for task, rows in (("a", 3), ("b", 4), ("a", 1), ("c", 1))
    ]
    cut = batcher().cut(waiting, model(), 0)
    assert (cut.size, cut.rows, cut.tasks) == (3, 8, {"a", "b"})


def test_who_does_not_fit_is_not_overtaken(make_request: MakeRequest) -> None:
    waiting = [make_request(rows=rows) for rows in (3, 6, 1)]
    cut = batcher().cut(waiting, model(), 0)
    assert (cut.size, cut.rows) == (1, 3)


def test_rows_of_another_shape_end_the_batch(make_request: MakeRequest) -> None:
    waiting = [make_request(row_shapes=((size,),)) for size in (4, 4, 5, 4)]
    assert batcher().cut(waiting, model(), 0).size == 2


@pytest.mark.parametrize(
    ("deadlines", "count"),
    [
        # A pass of n rows for one task takes 120 + 10 n.
        ([None, None, None, None], 4),
        ([160, None, None, None], 4),
        ([159, None, None, None], 3),
        ([150, None, None, None], 3),
        ([149, None, None, None], 2),
        ([130, None, None, None], 1),
        ([None, None, None, 160], 4),
        ([None, None, None, 159], 3),
        ([None, 140, None, 1000], 2),
        ([129, None, None, None], 4),  # hopeless even alone: it makes nobody wait
        ([129, 140, None, None], 2),
        ([1, 1, 1, 1], 4),
    ],
)
def test_a_batch_ends_where_it_would_spoil_a_deadline_in_it(
    make_request: MakeRequest, deadlines: list[int | None], count: int
) -> None:
    waiting = [make_request(deadline_ns=None if one is None else 5000 + one) for one in deadlines]
    assert batcher().cut(waiting, model(), 5000).size == count


def test_a_further_task_counts_with_its_tail(make_request: MakeRequest) -> None:
    waiting = [make_request(tasks=("a",), deadline_ns=150), make_request(tasks=("b",))]
    assert batcher().cut(waiting, model(), 0).size == 1
    waiting[1] = make_request(tasks=("a",))
    assert batcher().cut(waiting, model(), 0).size == 2


def test_a_deadline_that_is_met_to_the_last_bit_is_met(make_request: MakeRequest) -> None:
    """Tails added in another order may make a sum that differs in its last bit; the batch is never empty."""
    tails = {"a": 1.1, "b": 1.2, "c": 1.3, "d": 1.7}
    for trunk in (1.4, 1.7, 2.7, 4.7):
        latency = LatencyModel({1: trunk}, tails)
        for tasks in itertools.permutations(tails):
            for deadline_ns in range(6, 12):
                request = make_request(tasks=tasks, deadline_ns=deadline_ns)
                assert batcher().cut([request], latency, 0).size == 1


asked = st.lists(
    st.tuples(
        st.integers(1, 5),
        st.sets(st.sampled_from(TASKS), min_size=1).map(sorted).map(tuple),
        st.none() | st.integers(0, 400),
        st.sampled_from([((4,),)] * 5 + [((5,),)]),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=100)
@given(asked=asked, max_batch=st.integers(5, 16))
def test_the_cut_is_the_longest_front_that_keeps_the_deadlines_it_can(
    make_request: MakeRequest,
    asked: list[tuple[int, tuple[str, ...], int | None, tuple[tuple[int], ...]]],
    max_batch: int,
) -> None:
    latency = model()
    waiting = [
        make_request(rows=rows, tasks=tasks, deadline_ns=deadline, row_shapes=shapes)
        for rows, tasks, deadline, shapes in asked
    ]

    def is_good(count: int) -> bool:
        """Whether that many fit together, and none that could be in time alone is late."""
        front = waiting[:count]
        rows = sum(request.rows for request in front)
        finish = latency.expect({task for request in front for task in request.tasks}, rows)
        return (
            rows <= max_batch
            and len({request.row_shapes for request in front}) == 1
            and not any(
                request.deadline_ns is not None
                and latency.expect(request.tasks, request.rows) <= request.deadline_ns < finish
                for request in front
            )
        )

    cut = batcher(max_batch).cut(waiting, latency, 0)
    expected = max(count for count in range(1, len(waiting) + 1) if count == 1 or is_good(count))
    assert cut.size == expected
    assert cut.rows == sum(request.rows for request in waiting[: cut.size])
    assert cut.tasks == {task for request in waiting[: cut.size] for task in request.tasks}


def arrivals(gap_ns: int, last_ns: int, count: int = 200) -> ArrivalGap:
    """Many arrivals, evenly apart."""
    gap = ArrivalGap()
    for number in range(count):
        gap.arrived(last_ns - (count - 1 - number) * gap_ns)
    return gap


def queue_of(make_request: MakeRequest, *submitted_ns: int, deadline_ns: int | None = None) -> RequestQueue:
    queue = RequestQueue(100)
    for when in submitted_ns:
        queue.push(make_request(submitted_ns=when, deadline_ns=deadline_ns))
    return queue


def test_a_batch_is_held_for_some_gaps_after_the_last_arrival(make_request: MakeRequest) -> None:
    """A pass costs 100 µs however few rows it has; one row waits, and the next comes within 10 µs or so."""
    latency, gap = model(80_000.0, 1_000.0, 20_000.0), arrivals(10_000, MS)
    queue = queue_of(make_request, MS)
    assert latency.fixed_ns() == pytest.approx(100_000)
    assert batcher().hold_until_ns(queue, latency, gap, MS) == pytest.approx(MS + 30_000, abs=10)
    assert batcher().hold_until_ns(queue, latency, gap, MS + 29_000) == pytest.approx(MS + 30_000, abs=10)
    assert batcher().hold_until_ns(queue, latency, gap, MS + 31_000) is None, "arrivals have stopped"


@pytest.mark.parametrize(("waiting", "is_held"), [(1, True), (9, True), (10, False), (11, False)])
def test_more_rows_than_a_pass_saves_are_not_held(
    make_request: MakeRequest, waiting: int, is_held: bool
) -> None:
    latency, gap = model(80_000.0, 1_000.0, 20_000.0), arrivals(10_001, MS)
    queue = queue_of(make_request, *[MS] * waiting)
    until = batcher(max_batch=64).hold_until_ns(queue, latency, gap, MS)
    assert (until is not None) == is_held


def test_nothing_is_held_longer_than_max_delay_after_the_oldest_came(make_request: MakeRequest) -> None:
    latency, gap = model(80_000.0, 1_000.0, 20_000.0), arrivals(10_000, MS)
    queue = queue_of(make_request, MS - 4_000, MS - 9_000, MS)
    assert batcher(max_delay_ns=20_000).hold_until_ns(queue, latency, gap, MS) == MS + 11_000
    assert batcher(max_delay_ns=9_000).hold_until_ns(queue, latency, gap, MS) is None
    assert batcher(max_delay_ns=0).hold_until_ns(queue, latency, gap, MS) is None


def test_a_batch_that_cannot_grow_is_not_held(make_request: MakeRequest) -> None:
    latency, gap = model(80_000.0, 1_000.0, 20_000.0), arrivals(10_000, MS)
    queue = queue_of(make_request, MS, MS)
    assert batcher(max_batch=2).hold_until_ns(queue, latency, gap, MS) is None


def test_a_lonely_request_is_not_held(make_request: MakeRequest) -> None:
    latency, gap = model(80_000.0, 1_000.0, 20_000.0), ArrivalGap()
    queue = queue_of(make_request, MS)
    assert batcher().hold_until_ns(queue, latency, gap, MS) is None
    gap.arrived(MS)
    assert batcher().hold_until_ns(queue, latency, gap, MS) is None


def test_nothing_is_held_past_the_moment_at_which_a_deadline_could_just_be_kept(
    make_request: MakeRequest,
) -> None:
    latency, gap = model(80_000.0, 1_000.0, 20_000.0), arrivals(10_000, MS)
    longest = 80_000 + 2 * 1_000 + 20_000  # with one request more
    queue = queue_of(make_request, MS, deadline_ns=MS + longest + 7_000)
    assert batcher().hold_until_ns(queue, latency, gap, MS) == MS + 7_000
    queue = queue_of(make_request, MS, deadline_ns=MS + longest)
    assert batcher().hold_until_ns(queue, latency, gap, MS) is None
    latency.deviation = 0.25
    queue = queue_of(make_request, MS, deadline_ns=MS + round(1.5 * longest) + 7_000)
    assert batcher().hold_until_ns(queue, latency, gap, MS) == MS + 7_000


def test_the_gap_is_a_running_mean_and_a_pause_is_soon_forgotten() -> None:
    gap = ArrivalGap()
    assert gap.mean_ns == 10 * MS
    gap.arrived(0)
    assert gap.mean_ns == 10 * MS
    for number in range(1, 200):
        gap.arrived(number * 1_000)
    assert gap.mean_ns == pytest.approx(1_000, rel=1e-3)
    gap.arrived(10**15)
    assert gap.mean_ns == pytest.approx(900 + MS, rel=1e-3)
    assert gap.last_ns == 10**15

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from te_runtime.scheduling.request import Request
from te_runtime.scheduling.request_queue import RequestQueue

MakeRequest = Callable[..., Request]

pushes = st.tuples(
    st.just("push"),
    st.fixed_dictionaries(
        {
            "rank_ns": st.integers(-5, 20),
            "rows": st.integers(1, 4),
            "tasks": st.sampled_from([("a",), ("b",), ("a", "c")]),
            "deadline_ns": st.none() | st.integers(0, 30),
        }
    ),
)
takes = st.tuples(st.just("take"), st.tuples(st.integers(0, 5), st.integers(1, 3)))
removals = st.tuples(st.just("remove"), st.integers(0, 60))
expiries = st.tuples(st.just("expire"), st.integers(0, 30))
reranks = st.tuples(st.just("rerank"), st.integers(-1, 1))
operations = st.lists(st.one_of(pushes, pushes, pushes, takes, removals, expiries, reranks), max_size=60)


class PlainQueue:
    """The same by sorting a list each time."""

    def __init__(self) -> None:
        self.waiting: list[Request] = []

    def in_order(self) -> list[Request]:
        return sorted(self.waiting, key=lambda request: (request.rank_ns, request.sequence))

    def drop(self, gone: list[Request]) -> list[Request]:
        self.waiting = [request for request in self.waiting if request not in gone]
        return gone


def apply(queue: RequestQueue, plain: PlainQueue, made: list[Request], name: str, value: Any) -> None:
    """One operation on both, with equal results."""
    if name == "take":
        start, count = value
        assert queue.take(start, count) == plain.drop(plain.in_order()[start : start + count])
    elif name == "remove":
        if made:
            request = made[value % len(made)]
            assert queue.remove(request) == (request in plain.waiting)
            plain.drop([request])
    elif name == "expire":
        gone = [one for one in plain.waiting if one.deadline_ns is not None and one.deadline_ns <= value]
        gone.sort(key=lambda one: (one.deadline_ns, one.sequence))
        assert queue.take_expired(value) == plain.drop(gone)
    elif name == "rerank":
        queue.rerank(lambda request: value * request.rank_ns)


@settings(deadline=None, max_examples=80)
@given(operations=operations)
def test_it_is_a_sorted_list_that_knows_its_deadlines_and_tasks(
    make_request: MakeRequest, operations: list[tuple[str, Any]]
) -> None:
    queue, plain = RequestQueue(1000), PlainQueue()
    made: list[Request] = []
    for name, value in operations:
        if name == "push":
            request = make_request(**value)
            made.append(request)
            queue.push(request)
            plain.waiting.append(request)
        else:
            apply(queue, plain, made, name, value)
        expected = plain.in_order()
        assert list(queue) == expected
        assert len(queue) == len(expected)
        assert bool(queue) == bool(expected)
        assert list(queue.from_place(2)) == expected[2:]
        assert queue.rows == sum(request.rows for request in expected)
        assert queue.distinct_tasks == len({task for request in expected for task in request.tasks})
        deadlines = [one.deadline_ns for one in expected if one.deadline_ns is not None]
        assert queue.next_deadline_ns() == min(deadlines, default=None)
        assert {request for request in made if request.is_queued} == set(expected)


@pytest.mark.parametrize(("rank", "before"), [(-1, 0), (0, 1), (1, 3), (2, 4), (9, 4)])
def test_rows_before_a_rank_are_exact_for_one_row_each(
    make_request: MakeRequest, rank: int, before: int
) -> None:
    """Who has the same rank came earlier, and is before."""
    queue = RequestQueue(10)
    assert queue.rows_before(rank) == 0
    for one in (1, 0, 2, 1):
        queue.push(make_request(rank_ns=one))
    assert queue.rows_before(rank) == before


def test_rows_before_a_rank_are_about_right_for_several_rows(make_request: MakeRequest) -> None:
    queue = RequestQueue(10)
    for rank, rows in ((0, 1), (1, 5), (2, 3), (3, 3)):
        queue.push(make_request(rank_ns=rank, rows=rows))
    assert queue.rows_before(1) == 6
    assert queue.rows_before(3) == queue.rows == 12


def test_it_is_full_at_its_capacity(make_request: MakeRequest) -> None:
    queue = RequestQueue(2)
    assert not queue.is_full
    queue.push(make_request())
    assert not queue.is_full
    queue.push(make_request())
    assert queue.is_full
    queue.take(0, 1)
    assert not queue.is_full


def test_those_that_left_are_not_remembered(make_request: MakeRequest) -> None:
    """However many come and go before their deadlines, beside one that stays: memory is flat."""
    queue = RequestQueue(100_000)
    queue.push(make_request(deadline_ns=1))
    for deadline_ns in range(2, 20_000):
        request = make_request(deadline_ns=deadline_ns)
        queue.push(request)
        assert queue.remove(request)
        assert len(queue._deadlines) <= 2 * 2 + 65
    queue.take(0, 1)
    assert not queue._deadlines
    assert not queue._tasks


def test_an_empty_queue(make_request: MakeRequest) -> None:
    queue = RequestQueue(3)
    assert (len(queue), queue.rows, queue.distinct_tasks, queue.next_deadline_ns()) == (0, 0, 0, None)
    assert queue.take(0, 5) == []
    assert queue.take_expired(10**18) == []
    assert not queue.remove(make_request())

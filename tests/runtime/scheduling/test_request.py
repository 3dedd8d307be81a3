from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from te_runtime.scheduling.request import Request, rank_ns

MS = 1_000_000
S = 1_000_000_000
MakeRequest = Callable[..., Request]

# Nanoseconds in steps of a microsecond, so that floats tell two scores apart.
moments = st.integers(0, 10_000_000).map(lambda us: us * 1_000)
asked = st.tuples(
    st.sampled_from([0.0, 0.5, 1.0, 2.0, 99.5, 100.0]) | st.integers(0, 1000).map(lambda tenth: tenth / 10),
    st.none() | moments,  # deadline, from submission
    moments,  # submission
)


def score(request: Request, *, now_ns: int, capacity: int, patience_ns: int) -> float:
    """The specification's p - d / Σ r, d in milliseconds from now."""
    until = request.submitted_ns + patience_ns if request.deadline_ns is None else request.deadline_ns
    return request.priority - (until - now_ns) / 1e6 / capacity


@settings(deadline=None, max_examples=100)
@given(
    wanted=st.lists(asked, min_size=2, max_size=8),
    now_ns=moments,
    capacity=st.integers(1, 5),
    patience_ns=st.sampled_from([0, 5 * MS, S]),
)
def test_the_rank_orders_as_the_score_does_at_any_moment(
    make_request: MakeRequest,
    wanted: list[tuple[float, int | None, int]],
    now_ns: int,
    capacity: int,
    patience_ns: int,
) -> None:
    made = []
    for priority, allowed_ns, submitted_ns in wanted:
        deadline_ns = None if allowed_ns is None else submitted_ns + allowed_ns
        made.append(make_request(priority=priority, deadline_ns=deadline_ns, submitted_ns=submitted_ns))
    for request in made:
        request.rank_ns = rank_ns(request, capacity=float(capacity), patience_ns=patience_ns)
    scores = {
        request: score(request, now_ns=now_ns, capacity=capacity, patience_ns=patience_ns) for request in made
    }
    for one in made:
        for other in made:
            if scores[one] > scores[other] + 1e-7:
                assert one.rank_ns < other.rank_ns
            elif one.priority == other.priority and scores[one] == scores[other]:
                assert one.rank_ns == other.rank_ns


@settings(deadline=None, max_examples=100)
@given(first=asked, second=asked, capacity=st.integers(1, 64), patience_ns=st.sampled_from([0, 5 * MS, S]))
def test_nothing_that_comes_late_enough_ranks_before(
    make_request: MakeRequest,
    first: tuple[float, int | None, int],
    second: tuple[float, int | None, int],
    capacity: int,
    patience_ns: int,
) -> None:
    """The bound of rank_ns: submitted later than rank + (highest priority · Σ r) ms, it ranks behind."""
    priority, allowed_ns, submitted_ns = first
    waiting = make_request(
        priority=priority,
        submitted_ns=submitted_ns,
        deadline_ns=None if allowed_ns is None else submitted_ns + allowed_ns,
    )
    rank = rank_ns(waiting, capacity=float(capacity), patience_ns=patience_ns)
    priority, allowed_ns, later_ns = second
    submitted_ns = rank + 100 * capacity * MS + 1 + later_ns
    late = make_request(
        priority=priority,
        submitted_ns=submitted_ns,
        deadline_ns=None if allowed_ns is None else submitted_ns + allowed_ns,
    )
    assert rank_ns(late, capacity=float(capacity), patience_ns=patience_ns) > rank


def test_requests_are_compared_by_identity(make_request: MakeRequest) -> None:
    one, other = make_request(), make_request()
    assert one != other
    assert len({one, other, one}) == 2
    with pytest.raises(TypeError):
        _ = one < other  # type: ignore[operator]

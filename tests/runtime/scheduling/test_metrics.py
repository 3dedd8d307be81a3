from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from te_runtime import InputError
from te_runtime.scheduling.metrics import LATENCY_BUCKETS_MS, Histogram, MetricsRecorder, SchedulerMetrics
from te_runtime.scheduling.request import Request


def report(recorder: MetricsRecorder) -> SchedulerMetrics:
    return recorder.report(
        queue_length=3,
        running=2,
        prediction_error=-0.1,
        prediction_absolute_error=0.2,
        executors=(),
        uptime_s=1.5,
    )


def answered(recorder: MetricsRecorder, rows: int, *answers: tuple[tuple[str, ...], float, bool]) -> None:
    """Count a batch of which each request has tasks, a latency in milliseconds, and is in time or not."""
    done_ns = 10**12
    requests = [
        Request(
            data=(),
            row_shapes=(),
            rows=1,
            tasks=tasks,
            is_single=False,
            priority=0.0,
            deadline_ns=done_ns if in_time else done_ns - 1,
            submitted_ns=done_ns - round(latency_ms * 1e6),
            sequence=0,
        )
        for tasks, latency_ms, in_time in answers
    ]
    recorder.answered(requests, rows, done_ns)


def test_nothing_has_happened_yet() -> None:
    found = report(MetricsRecorder(("a", "b")))
    assert found.accepted == 0
    assert found.refused == {"queue_full": 0, "deadline": 0, "closed": 0}
    assert found.outcomes == dict.fromkeys(
        ("in_time", "late", "failed", "expired", "cancelled", "dropped"), 0
    )
    assert (found.queue_length, found.running, found.uptime_s) == (3, 2, 1.5)
    assert found.batch_rows == {}
    assert set(found.latency_ms) == {"a", "b"}
    assert found.latency_ms["a"].count == 0
    assert found.latency_ms["a"].quantile(0.5) is None
    assert (found.prediction_error, found.prediction_absolute_error) == (-0.1, 0.2)


def test_what_happened_is_counted_once_each() -> None:
    recorder = MetricsRecorder(("a", "b"))
    for _ in range(9):
        recorder.accepted()
    recorder.refused("deadline")
    recorder.refused("deadline")
    recorder.refused("closed")
    recorder.ended("cancelled")
    recorder.ended("dropped", 2)
    answered(recorder, 5, (("a",), 0.1, True), (("a", "b"), 3.0, False), (("b",), 20_000.0, True))
    answered(recorder, 2, (("b",), 0.3, True))
    answered(recorder, 5, (("b",), 0.3, True))
    found = report(recorder)
    assert found.accepted == 9
    assert found.refused == {"queue_full": 0, "deadline": 2, "closed": 1}
    assert found.outcomes == {
        "in_time": 4,
        "late": 1,
        "failed": 0,
        "expired": 0,
        "cancelled": 1,
        "dropped": 2,
    }
    assert found.batch_rows == {2: 1, 5: 2}
    assert list(found.batch_rows) == [2, 5]
    assert found.latency_ms["a"].count == 2
    assert found.latency_ms["a"].total == pytest.approx(3.1)
    assert found.latency_ms["b"].counts[-1] == 1
    assert found.latency_ms["b"].total == pytest.approx(20_003.6)


def test_a_report_does_not_change_afterwards() -> None:
    recorder = MetricsRecorder(("a",))
    before = report(recorder)
    answered(recorder, 1, (("a",), 1.0, True))
    recorder.refused("closed")
    assert before.latency_ms["a"].count == before.outcomes["in_time"] == before.refused["closed"] == 0
    assert before.batch_rows == {}


def test_threads_count_together() -> None:
    recorder = MetricsRecorder(("a",))

    def work() -> None:
        for _ in range(500):
            answered(recorder, 1, (("a",), 1.0, True))
            recorder.ended("failed")
            recorder.refused("queue_full")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = report(recorder)
    assert found.outcomes["in_time"] == found.outcomes["failed"] == found.refused["queue_full"] == 2000
    assert found.latency_ms["a"].count == found.batch_rows[1] == 2000


latencies = st.integers(0, 20_000_000_000).map(lambda ns: ns / 1e6) | st.sampled_from(LATENCY_BUCKETS_MS)


@settings(deadline=None, max_examples=80)
@given(
    values=st.lists(latencies, min_size=1, max_size=60),
    part=st.sampled_from([0.0, 0.07, 0.5, 0.7, 0.9, 0.99, 1.0]),
)
def test_a_quantile_is_the_bound_of_the_bucket_that_holds_it(values: list[float], part: float) -> None:
    recorder = MetricsRecorder(("a",))
    answered(recorder, len(values), *[(("a",), value, True) for value in values])
    histogram = report(recorder).latency_ms["a"]
    assert histogram.count == len(values)
    assert histogram.total == pytest.approx(sum(values))
    enough = [
        bound for bound in LATENCY_BUCKETS_MS if sum(value <= bound for value in values) / len(values) >= part
    ]
    if part == 0.0:
        enough = [bound for bound in LATENCY_BUCKETS_MS if bound >= min(values)]
    assert histogram.quantile(part) == (enough[0] if enough else None)


@pytest.mark.parametrize(("part", "count"), [(0.07, 100), (0.7, 10), (0.55, 100), (0.29, 100), (0.57, 100)])
def test_a_quantile_is_exact_where_a_product_of_floats_is_not(part: float, count: int) -> None:
    inside = round(part * count)
    histogram = Histogram((1.0, 2.0), (inside, count - inside, 0), 0.0)
    assert histogram.quantile(part) == 1.0


@pytest.mark.parametrize("part", [-0.1, 1.1, 99, math.nan, math.inf])
def test_a_quantile_that_is_none_is_refused(part: float) -> None:
    with pytest.raises(InputError, match=r"quantile: found .*, expected a part from 0 to 1"):
        Histogram((1.0,), (1, 0), 1.0).quantile(part)

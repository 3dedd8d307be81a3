"""What Prometheus reads is what the dataclass says, whatever names tasks and executors have."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from te_runtime.scheduling.metrics import (
    LATENCY_BUCKETS_MS,
    ExecutorMetrics,
    Histogram,
    SchedulerMetrics,
)
from te_runtime.scheduling.prometheus import SchedulerCollector, prometheus_text
from te_runtime.scheduling.resource_pool import ResourceState

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

HOSTILE = 'a"b\\c\nd{e="f"} 1\n# TYPE x counter\nté 日本'
counts = st.integers(0, 10**9)
names = st.one_of(st.just(HOSTILE), st.text(st.characters(codec="utf-8"), max_size=20))


def parse(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def at(found: Samples, name: str, **labels: str) -> float:
    return found[f"te_runtime_{name}", frozenset(labels.items())]


@st.composite
def any_metrics(draw: st.DrawFn) -> SchedulerMetrics:
    def histogram() -> Histogram:
        size = len(LATENCY_BUCKETS_MS) + 1
        own = draw(st.lists(st.integers(0, 10**6), min_size=size, max_size=size))
        return Histogram(LATENCY_BUCKETS_MS, tuple(own), draw(st.floats(0, 1e9)))

    states: tuple[ResourceState, ...] = ("live", "suspect", "stuck", "out")
    return SchedulerMetrics(
        accepted=draw(counts),
        refused={reason: draw(counts) for reason in ("queue_full", "deadline", "closed")},
        outcomes={
            outcome: draw(counts)
            for outcome in ("in_time", "late", "failed", "expired", "cancelled", "dropped")
        },
        queue_length=draw(counts),
        running=draw(counts),
        batch_rows=draw(st.dictionaries(st.integers(1, 65536), st.integers(1, 10**6), max_size=6)),
        latency_ms={task: histogram() for task in draw(st.sets(names, max_size=3))},
        prediction_error=draw(st.floats(-1, 1e6)),
        prediction_absolute_error=draw(st.floats(0, 1e6)),
        executors=tuple(
            ExecutorMetrics(
                name,
                draw(st.sampled_from(states)),
                draw(counts),
                draw(st.floats(0, 1e9)),
                draw(st.floats(0, 1)),
                None,
            )
            for name in draw(st.sets(names, max_size=3))
        ),
        uptime_s=draw(st.floats(0, 1e9)),
    )


ONE = SchedulerMetrics(
    accepted=7,
    refused={"queue_full": 1, "deadline": 2, "closed": 0},
    outcomes={"in_time": 3, "late": 1, "failed": 0, "expired": 0, "cancelled": 2, "dropped": 0},
    queue_length=1,
    running=0,
    batch_rows={1: 2, 3: 1, 64: 4},
    latency_ms={"click": Histogram((0.5, 2.5), (1, 2, 3), 40.0)},
    prediction_error=-0.25,
    prediction_absolute_error=0.5,
    executors=(ExecutorMetrics("cpu-0", "stuck", 7, 1.5, 0.75, "StallError: it hangs"),),
    uptime_s=2.0,
)


@given(metrics=any_metrics())
def test_every_figure_comes_back(metrics: SchedulerMetrics) -> None:
    found = parse(prometheus_text(metrics))

    assert at(found, "accepted_total") == metrics.accepted
    for outcome, count in metrics.outcomes.items():
        assert at(found, "requests_total", outcome=outcome) == count
    for reason, count in metrics.refused.items():
        assert at(found, "refused_total", reason=reason) == count
    assert at(found, "queue_length") == metrics.queue_length
    assert at(found, "running_requests") == metrics.running
    assert at(found, "prediction_error_ratio") == metrics.prediction_error
    assert at(found, "prediction_absolute_error_ratio") == metrics.prediction_absolute_error
    assert at(found, "scheduler_uptime_seconds") == metrics.uptime_s
    for task, histogram in metrics.latency_ms.items():
        assert at(found, "request_latency_seconds_count", task=task) == histogram.count
        assert at(found, "request_latency_seconds_sum", task=task) == histogram.total / 1e3
    for executor in metrics.executors:
        assert at(found, "executor_batches_total", executor=executor.name) == executor.batches
        assert at(found, "executor_busy_seconds_total", executor=executor.name) == executor.busy_s
        assert at(found, "executor_utilization_ratio", executor=executor.name) == executor.utilization
        states = {
            state: at(found, "executor_state", executor=executor.name, state=state)
            for state in ("live", "suspect", "stuck", "out")
        }
        assert states == {state: float(state == executor.state) for state in states}
    assert at(found, "batch_rows_count") == sum(metrics.batch_rows.values())
    assert at(found, "batch_rows_sum") == sum(rows * count for rows, count in metrics.batch_rows.items())


def test_buckets_are_cumulative_and_in_seconds() -> None:
    found = parse(prometheus_text(ONE))

    buckets = {
        le: at(found, "request_latency_seconds_bucket", task="click", le=le)
        for le in ("0.0005", "0.0025", "+Inf")
    }
    assert buckets == {"0.0005": 1, "0.0025": 3, "+Inf": 6}
    rows = {le: at(found, "batch_rows_bucket", le=le) for le in ("1.0", "2.0", "4.0", "32.0", "64.0", "+Inf")}
    assert rows == {"1.0": 2, "2.0": 2, "4.0": 3, "32.0": 3, "64.0": 7, "+Inf": 7}


def test_a_hostile_task_name_adds_no_metric_and_no_label() -> None:
    plain = prometheus_text(ONE)
    hostile = prometheus_text(replace(ONE, latency_ms={HOSTILE: Histogram((0.5, 2.5), (1, 2, 3), 40.0)}))

    assert len(hostile.splitlines()) == len(plain.splitlines())
    assert {name for name, _ in parse(hostile)} == {name for name, _ in parse(plain)}
    assert at(parse(hostile), "request_latency_seconds_count", task=HOSTILE) == 6


def test_text_of_an_error_is_not_a_label() -> None:
    assert "hangs" not in prometheus_text(ONE)


def test_a_registry_asks_when_it_is_read_and_not_when_it_is_told_of_a_scheduler() -> None:
    asked: list[None] = []

    def read() -> SchedulerMetrics:
        asked.append(None)
        return replace(ONE, accepted=len(asked))

    registry = CollectorRegistry(auto_describe=True)
    registry.register(SchedulerCollector(read))
    assert not asked
    for expected in (1, 2):
        assert at(parse(generate_latest(registry).decode()), "accepted_total") == expected


def test_several_schedulers_share_the_names_and_differ_in_a_label() -> None:
    schedulers = {"ranker": lambda: replace(ONE, accepted=3), "ads": lambda: replace(ONE, accepted=5)}
    registry = CollectorRegistry()
    registry.register(SchedulerCollector(schedulers))

    text = generate_latest(registry).decode()
    found = parse(text)
    assert at(found, "accepted_total", scheduler="ranker") == 3
    assert at(found, "accepted_total", scheduler="ads") == 5
    assert at(found, "executor_batches_total", scheduler="ads", executor="cpu-0") == 7
    assert text.count("# TYPE te_runtime_accepted_total ") == 1


def test_a_second_collector_in_one_registry_is_refused() -> None:
    registry = CollectorRegistry()
    registry.register(SchedulerCollector(lambda: ONE))
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(SchedulerCollector(lambda: ONE))


def test_without_the_library_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "te_runtime.scheduling.prometheus")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'te-runtime\[metrics\]'"):
        importlib.import_module("te_runtime.scheduling.prometheus")


def test_a_scheduler_loads_no_prometheus() -> None:
    program = "import sys, te_runtime; te_runtime.Scheduler; assert 'prometheus_client' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

"""A scheduler's metrics for Prometheus, through its client library, which is an extra: pip install 'te-runtime[metrics]'.

    text = prometheus_text(scheduler.metrics())                        # for an HTTP handler of one's own
    REGISTRY.register(SchedulerCollector(scheduler.metrics))           # or beside other metrics of the process

Names and units follow Prometheus' conventions: base units, so seconds; `_total` for what only grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import get_args

from te_runtime.scheduling.metrics import Histogram, SchedulerMetrics
from te_runtime.scheduling.resource_pool import ResourceState

try:
    from prometheus_client import CollectorRegistry, Metric, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "prometheus_client":
        raise
    raise ModuleNotFoundError(
        "metrics in Prometheus text form need the package prometheus_client, which is not installed. "
        "Run: pip install 'te-runtime[metrics]'",
        name="prometheus_client",
    ) from error

__all__ = ["SchedulerCollector", "prometheus_text"]

_BATCH_ROWS = tuple(1 << power for power in range(17))  # up to the largest max_batch there may be
_MS_PER_S = 1e3

Read = Callable[[], SchedulerMetrics]


class SchedulerCollector(Collector):
    """Gives the metrics of one or several schedulers to a registry, as they are whenever it asks."""

    def __init__(self, schedulers: Read | Mapping[str, Read]) -> None:
        """Remember what to ask.

        Args:
            schedulers: a scheduler's `metrics` method; or several by name, which then stands in the label
                `scheduler`. Several must share one collector: a registry takes each name of a metric once.
        """
        self._named = isinstance(schedulers, Mapping)
        self._reads = dict(schedulers) if isinstance(schedulers, Mapping) else {"": schedulers}

    def describe(self) -> Iterable[Metric]:
        """The metrics without values, so that registering asks no scheduler."""
        return _families([], self._labels)

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now.

        Raises:
            ClosedError: a scheduler was made before this process was forked.
        """
        found: list[tuple[tuple[str, ...], SchedulerMetrics]] = [
            ((name,) if self._named else (), read()) for name, read in self._reads.items()
        ]
        return _families(found, self._labels)

    @property
    def _labels(self) -> tuple[str, ...]:
        return ("scheduler",) if self._named else ()


def prometheus_text(metrics: SchedulerMetrics) -> str:
    """Metrics in Prometheus' text form, version 0.0.4: send it as `text/plain; version=0.0.4; charset=utf-8`."""
    registry = CollectorRegistry()
    registry.register(SchedulerCollector(lambda: metrics))
    text: bytes = generate_latest(registry)
    return text.decode("utf-8")


_Found = Sequence[tuple[tuple[str, ...], SchedulerMetrics]]


def _families(found: _Found, labels: tuple[str, ...]) -> Iterator[Metric]:
    yield from _request_families(found, labels)
    yield from _prediction_families(found, labels)
    yield from _executor_families(found, labels)


def _request_families(found: _Found, labels: tuple[str, ...]) -> Iterator[Metric]:
    accepted = CounterMetricFamily("te_runtime_accepted", "Requests let in.", labels=labels)
    ended = CounterMetricFamily(
        "te_runtime_requests", "Requests that were let in and ended, by outcome.", labels=(*labels, "outcome")
    )
    refused = CounterMetricFamily(
        "te_runtime_refused", "Requests that were not let in, by reason.", labels=(*labels, "reason")
    )
    waiting = GaugeMetricFamily("te_runtime_queue_length", "Requests that wait.", labels=labels)
    running = GaugeMetricFamily("te_runtime_running_requests", "Requests that run.", labels=labels)
    latency = HistogramMetricFamily(
        "te_runtime_request_latency_seconds",
        "From submission to answer, of answered requests that asked for the task.",
        labels=(*labels, "task"),
    )
    batch_rows = HistogramMetricFamily("te_runtime_batch_rows", "Rows of answered batches.", labels=labels)
    for own, metrics in found:
        accepted.add_metric(own, metrics.accepted)
        for outcome, count in metrics.outcomes.items():
            ended.add_metric((*own, outcome), count)
        for reason, count in metrics.refused.items():
            refused.add_metric((*own, reason), count)
        waiting.add_metric(own, metrics.queue_length)
        running.add_metric(own, metrics.running)
        for task, histogram in metrics.latency_ms.items():
            latency.add_metric((*own, task), _seconds(histogram), histogram.total / _MS_PER_S)
        rows = metrics.batch_rows
        total = sum(size * count for size, count in rows.items())
        batch_rows.add_metric(own, _row_buckets(rows), total)
    yield from (accepted, ended, refused, waiting, running, latency, batch_rows)


def _prediction_families(found: _Found, labels: tuple[str, ...]) -> Iterator[Metric]:
    error = GaugeMetricFamily(
        "te_runtime_prediction_error_ratio",
        "Running mean over batches of (observed - expected) / expected latency.",
        labels=labels,
    )
    absolute = GaugeMetricFamily(
        "te_runtime_prediction_absolute_error_ratio", "The same of its absolute value.", labels=labels
    )
    uptime = GaugeMetricFamily(
        "te_runtime_scheduler_uptime_seconds", "Since the scheduler began.", labels=labels
    )
    for own, metrics in found:
        error.add_metric(own, metrics.prediction_error)
        absolute.add_metric(own, metrics.prediction_absolute_error)
        uptime.add_metric(own, metrics.uptime_s)
    yield from (error, absolute, uptime)


def _executor_families(found: _Found, labels: tuple[str, ...]) -> Iterator[Metric]:
    of_one = (*labels, "executor")
    batches = CounterMetricFamily("te_runtime_executor_batches", "Batches answered.", labels=of_one)
    busy = CounterMetricFamily("te_runtime_executor_busy_seconds", "Time spent on batches.", labels=of_one)
    utilization = GaugeMetricFamily(
        "te_runtime_executor_utilization_ratio", "Busy time over uptime, 0 to 1.", labels=of_one
    )
    state = GaugeMetricFamily(
        "te_runtime_executor_state", "1 for the state that the executor is in.", labels=(*of_one, "state")
    )
    for own, metrics in found:
        for executor in metrics.executors:
            name = (*own, executor.name)
            batches.add_metric(name, executor.batches)
            busy.add_metric(name, executor.busy_s)
            utilization.add_metric(name, executor.utilization)
            for one in get_args(ResourceState):
                state.add_metric((*name, one), float(executor.state == one))
    yield from (batches, busy, utilization, state)


def _seconds(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [str(bound / _MS_PER_S) for bound in histogram.bounds]
    return list(zip([*bounds, "+Inf"], accumulate(histogram.counts), strict=True))


def _row_buckets(rows: Mapping[int, int]) -> list[tuple[str, float]]:
    """The same buckets always, so that those of several processes can be added."""
    below = [sum(count for size, count in rows.items() if size <= bound) for bound in _BATCH_ROWS]
    bounds = [str(float(bound)) for bound in _BATCH_ROWS]
    return list(zip([*bounds, "+Inf"], [*below, sum(rows.values())], strict=True))

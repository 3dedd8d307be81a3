"""Timing the staged graphs of a bundle, each variant's beside fp32's of the same kind.

    joint graphs of all variants in turns → task graphs of the first task in turns → …

Only what --measure-latency asks for: the figures are true of one machine and one run, so that a bundle that holds them
has other bytes each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from te_export.models.input_rows import InputRows
from te_export.precision.latency import BATCH_SIZES, LatencyRatio, latency_feeds, measure_ratios
from te_runtime.machine import LocalMachine
from te_runtime.manifest import GraphLatency, GraphSpec, Latency, Variant
from te_runtime.session import open_session
from te_runtime.session_types import Session

__all__ = ["AddedLatency", "Open", "measure_latency", "staged_opener"]

_THREADS = 1
_MOST_SECONDS = 60.0
_SECONDS_AT_ONCE = 1.0
_LONGEST_NAME = 200

Open = Callable[[GraphSpec], Session]


@dataclass(frozen=True)
class AddedLatency:
    """What was measured; `untimed` are the tasks that the time did not suffice for."""

    latency: Latency
    untimed: tuple[str, ...]

    @property
    def detail(self) -> str:
        graphs = len({entry.path for entry in self.latency.graphs})
        sizes = ", ".join(map(str, BATCH_SIZES))
        left = f"; no time was left for {len(self.untimed)} tasks" if self.untimed else ""
        return f"{graphs} graphs over {sizes} rows, one thread{left}"

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.untimed:
            return ()
        return (
            f"latency: the joint graph and the first tasks took {_MOST_SECONDS:g} s, so that {len(self.untimed)} tasks "
            f"are not timed: {self.untimed[0]} and what follows it",
        )


def measure_latency(
    variants: Sequence[Variant],
    rows: InputRows,
    open_graph: Open,
    *,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> AddedLatency:
    """Time the joint graph and each task graph of every variant, in one thread on the CPU.

    A minute is enough for all: with many tasks each gets less of it, and those that are left when it is over are not
    timed. A single call is never cut short.

    Args:
        variants: the first is fp32.
        rows: to run the graphs on.
        open_graph: opens a graph of the bundle with one thread.
        clock_ns: tells the time in nanoseconds.

    Raises:
        BundleError: a graph failed while it ran.
    """
    kinds = list(_kinds(variants))
    seconds = min(_SECONDS_AT_ONCE, _MOST_SECONDS / (2 * len(kinds) * len(BATCH_SIZES)))
    end_ns = clock_ns() + round(_MOST_SECONDS * 1e9)
    found: list[GraphLatency] = []
    untimed: list[str] = []
    for task, graphs in kinds:
        if task is not None and clock_ns() > end_ns:
            untimed.append(task)
            continue
        sessions = {graph.path: open_graph(graph) for graph in graphs}
        feeds = latency_feeds([spec.name for spec in graphs[0].inputs], rows)
        found += map(_entry, measure_ratios(sessions, feeds, seconds=seconds, clock_ns=clock_ns))
    return AddedLatency(_latency(found), tuple(untimed))


def staged_opener(root: Path) -> Open:
    """Opens graphs of the staged bundle at `root` on the CPU, in one thread."""
    return lambda graph: open_session(root / graph.path, graph, provider="cpu", threads=_THREADS)


def _kinds(variants: Sequence[Variant]) -> Iterator[tuple[str | None, list[GraphSpec]]]:
    """The joint graphs, then each task's graphs with the task's name; fp32's come first."""
    yield None, [variant.joint for variant in variants]
    for tasks in zip(*(variant.tasks for variant in variants), strict=True):
        yield tasks[0].task, [graphs.graph for graphs in tasks]


def _entry(measured: LatencyRatio) -> GraphLatency:
    return GraphLatency(
        path=measured.name,
        batch=measured.batch,
        p50_us=measured.latency_us,
        p10_us=measured.latency_low_us,
        p90_us=measured.latency_high_us,
        rounds=measured.rounds,
        ratio=measured.ratio,
    )


def _latency(graphs: Sequence[GraphLatency]) -> Latency:
    model = "".join(char for char in LocalMachine().cpu().model if char.isprintable())
    return Latency(
        machine=model[:_LONGEST_NAME] or "unknown",
        onnxruntime=onnxruntime.__version__,
        provider="cpu",
        threads=_THREADS,
        graphs=tuple(graphs),
    )

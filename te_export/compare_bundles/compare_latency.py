"""What the two exports measured of latency, side by side; each on its own machine, in its own run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from te_export.compare_bundles.result import LatencyChange, LatencyDiff, LatencySide, TaskPair
from te_runtime.manifest import GraphLatency, Manifest, Precision

__all__ = ["compare_latency"]


def compare_latency(before: Manifest, after: Manifest, tasks: Sequence[TaskPair]) -> LatencyDiff:
    """The graphs and batch sizes that both exports measured."""
    sides = _side(before), _side(after)
    if before.latency is None or after.latency is None:
        return LatencyDiff(*sides, (), is_same=before.latency == after.latency)
    old = {(entry.path, entry.batch): entry for entry in before.latency.graphs}
    new = {(entry.path, entry.batch): entry for entry in after.latency.graphs}
    batches = dict.fromkeys(entry.batch for entry in before.latency.graphs)
    found = []
    for graph in _common_graphs(before, after, tasks):
        for batch in batches:
            one, other = old.get((graph.path_before, batch)), new.get((graph.path_after, batch))
            if one is not None and other is not None:
                found.append(_change(graph, one, other))
    return LatencyDiff(*sides, tuple(found), is_same=before.latency == after.latency)


class _Graph(NamedTuple):
    """A joint graph or a task graph of both bundles."""

    precision: Precision
    task: TaskPair | None
    path_before: str
    path_after: str


def _side(manifest: Manifest) -> LatencySide | None:
    found = manifest.latency
    return (
        None
        if found is None
        else LatencySide(found.machine, found.onnxruntime, found.provider, found.threads)
    )


def _common_graphs(before: Manifest, after: Manifest, tasks: Sequence[TaskPair]) -> Iterator[_Graph]:
    variants = {variant.precision: variant for variant in after.variants}
    for old in before.variants:
        new = variants.get(old.precision)
        if new is None:
            continue
        yield _Graph(old.precision, None, old.joint.path, new.joint.path)
        paths_before = {graphs.task: graphs.graph.path for graphs in old.tasks}
        paths_after = {graphs.task: graphs.graph.path for graphs in new.tasks}
        for pair in tasks:
            if pair.before is not None and pair.after is not None:
                yield _Graph(old.precision, pair, paths_before[pair.before], paths_after[pair.after])


def _change(graph: _Graph, before: GraphLatency, after: GraphLatency) -> LatencyChange:
    return LatencyChange(
        task=graph.task,
        precision=graph.precision,
        batch=before.batch,
        p50_us_before=before.p50_us,
        p50_us_after=after.p50_us,
        p10_us_before=before.p10_us,
        p10_us_after=after.p10_us,
        p90_us_before=before.p90_us,
        p90_us_after=after.p90_us,
    )

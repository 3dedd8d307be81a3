"""What the text says of latency: medians of two separate runs, and the command that measures both in one."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from te_export.compare_bundles.result import BundleDiff, LatencyChange, LatencyDiff, LatencySide
from te_export.compare_bundles.text_layout import NOTHING, escaped, field, table
from te_export.compare_bundles.text_variants import shown_task

__all__ = ["latency_lines"]

_SHOWN_GRAPHS = 24


def latency_lines(diff: BundleDiff, *, verbose: bool) -> Iterator[str]:
    """The section on latency, also where there is nothing to compare."""
    found = diff.latency
    if found.before is None or found.after is None:
        without = [name for name, side in (("A", found.before), ("B", found.after)) if side is None]
        yield f"latency: not measured by the export of {' or '.join(without)}; --measure-latency does"
    else:
        yield from _table_lines(found, limit=None if verbose else _SHOWN_GRAPHS)
        yield from _machine_lines(found, found.before, found.after)
    command = shlex.join(["te-runtime", "bench", diff.a.path, "--compare", diff.b.path])
    yield f"Both in turns, on this machine: {escaped(command)}"


def _table_lines(found: LatencyDiff, *, limit: int | None) -> Iterator[str]:
    yield "latency when exported: median microseconds, each in a run of its own"
    if not found.graphs:
        yield from field("note", "no graph was measured at the same batch size in both")
        return
    headings = ("variant", "graph", "batch", "A", "B", *(["B/A"] if found.is_comparable else []))
    yield from table(headings, [_row(found, graph) for graph in found.graphs[:limit]], names=2)
    if limit is not None and len(found.graphs) > limit:
        yield f"  ... and {len(found.graphs) - limit} more; -v shows all"


def _machine_lines(found: LatencyDiff, before: LatencySide, after: LatencySide) -> Iterator[str]:
    if not found.is_comparable:
        yield from field("A on", _shown_side(before))
        yield from field("B on", _shown_side(after))
        yield from field("note", "measured on different machines or in different ways, so there is no ratio")
        return
    yield from field("on", _shown_side(before))
    yield from field(
        "note",
        "separate runs of one graph differ too; ~ marks ratios where the spreads (10th to 90th percentile) touch",
    )


def _row(latency: LatencyDiff, graph: LatencyChange) -> tuple[str, ...]:
    name = "all tasks" if graph.task is None else shown_task(graph.task)
    row = (graph.precision, name, str(graph.batch), _us(graph.p50_us_before), _us(graph.p50_us_after))
    if not latency.is_comparable:
        return row
    ratio = latency.ratio(graph)
    shown = NOTHING if ratio is None else f"{'~' if graph.spreads_overlap else ''}{ratio:.2f}x"
    return (*row, shown)


def _us(time_us: float) -> str:
    return f"{time_us:,.1f}" if time_us < 1000 else f"{time_us:,.0f}"


def _shown_side(side: LatencySide) -> str:
    threads = "1 thread" if side.threads == 1 else f"{side.threads} threads"
    return f"{escaped(side.machine)}, onnxruntime {escaped(side.onnxruntime)}, {side.provider}, {threads}"

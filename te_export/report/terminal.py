"""What a person sees at the end of an export: one table, what to know, and the next command."""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from te_export.options import ExportResult, TaskPruning
from te_export.report.latency_figures import measured_on, microseconds, timed_graphs
from te_export.report.layer_figures import costliest_layers
from te_export.report.pruning_figures import EXPERT_HEADINGS, expert_rows, found_line
from te_export.report.rewrite_costs import COST_HEADINGS, cost_rows
from te_export.report.variant_figures import accuracy_table, judged_rows, loss_meaning
from te_runtime.manifest import Latency, Manifest, TaskParity, Variant

__all__ = ["result_lines"]

_NARROWEST = 72
_SHOWN_TASKS = 8


def result_lines(result: ExportResult, *, verbose: bool) -> Iterator[str]:
    """The lines to print, for a terminal or a pipe alike."""
    yield ""
    yield from _table(result)
    yield _sizes(result)
    yield "max error:  of the prediction on ordinary rows, against torch in float64, the worst of every graph"
    yield "vs torch:   error over torch float32's own, prediction and routing weights, in the worst group of rows"
    yield "size alone: the task's graph with the weights it reads, most of which the tasks share"
    if result.variants or result.failed_variants:
        yield ""
        yield from _variant_table(result)
        for variant in result.manifest.variants[1:]:
            yield ""
            yield from _accuracy_lines(variant)
        if result.variants:
            yield "arg-max, top expert: rows in which the largest output and routing weight are the oracle's"
    if result.manifest.latency is not None:
        yield ""
        yield from _latency_lines(result.manifest, result.manifest.latency)
    if result.pruning:
        yield ""
        yield from _pruning_lines(result.pruning)
    if result.rewrites.costs:
        yield ""
        yield from _cost_table(result)
    if verbose:
        yield from (f"rewritten: {entry}" for entry in result.rewrites.applied)
        yield from (f"left alone: {entry}" for entry in result.rewrites.declined)
        producer = result.manifest.producer
        yield f"opset {producer.opset}, onnxruntime {producer.onnxruntime}, torch {producer.torch}"
    for note in result.notes:
        yield f"note: {note}"
    yield ""
    if not result.published:
        checks = "a variant was left out" if result.failed_variants else "every check passed"
        yield f"Dry run: {checks} and nothing was written. Without --dry-run: {result.bundle}"
        return
    yield f"Bundle: {result.bundle}"
    yield f"Next:   te-runtime verify {shlex.quote(str(result.bundle))}"


def _sizes(result: ExportResult) -> str:
    tasks, apart = len(result.task_size_bytes), sum(result.task_size_bytes.values())
    variants = len(result.manifest.variants)
    counted = f"{tasks} tasks" if variants == 1 else f"{tasks} tasks, {variants} variants"
    together = result.size_bytes if variants == 1 else _folder_bytes(result, "fp32")
    saving = "fp32 tasks exported apart" if variants > 1 else "exported apart they"
    told = f"; {saving} would take {_megabytes(apart)}" if apart > together else ""
    return f"{counted} in {_megabytes(result.size_bytes)}{told}."


def _folder_bytes(result: ExportResult, folder: str) -> int:
    return sum(entry.size_bytes for entry in result.manifest.files if entry.path.startswith(f"{folder}/"))


def _table(result: ExportResult) -> list[str]:
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    table.add_column("task", overflow="fold")
    table.add_column("output", no_wrap=True)
    for heading in ("max error", "vs torch", "size alone"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, parity in zip(result.manifest.tasks, result.manifest.variants[0].parity, strict=True):
        ratio = parity.worst_ratio
        table.add_row(
            task.name,
            "(" + ", ".join(str(axis) for axis in task.prediction.shape) + ")",
            f"{_ordinary_error(parity):.1e}",
            "-" if ratio is None else f"{ratio:.2f}x",
            _megabytes(result.task_size_bytes[task.name]),
        )
    return _printed(table)


def _variant_table(result: ExportResult) -> list[str]:
    """Size and latency of each variant over fp32's."""
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    for heading in ("variant", "form"):
        table.add_column(heading, no_wrap=True)
    for heading in ("size", "of fp32", "all tasks over fp32, one thread"):
        table.add_column(heading, justify="right", no_wrap=True)
    whole = _folder_bytes(result, "fp32")
    table.add_row("fp32", "float32", _megabytes(whole), "", "")
    for summary in result.variants:
        for form, ratios in summary.latencies.items():
            kept = form == summary.form
            table.add_row(
                summary.precision if kept else "",
                form if kept else f"{form}, not taken",
                _megabytes(summary.size_bytes) if kept else "",
                f"{summary.size_bytes / whole:.2f}x" if kept else "",
                ", ".join(f"{ratio.ratio:.2f}x B={ratio.batch}" for ratio in ratios),
            )
    for failed in result.failed_variants:
        table.add_row(failed.precision, "left out")
    return _printed(table)


def _accuracy_lines(variant: Variant) -> list[str]:
    headings, rows = accuracy_table(variant)
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return [
        f"{variant.precision} ({variant.form}) against the oracle, {judged_rows(variant)}",
        *_printed(table),
        f"loss: {loss_meaning(variant)}",
        *([f"layers that cost most points: {costliest}"] if (costliest := costliest_layers(variant)) else []),
    ]


def _latency_lines(manifest: Manifest, latency: Latency) -> Iterator[str]:
    """A line per graph and variant, for all tasks and the first of them."""
    yield f"latency, median and over fp32, on {measured_on(latency)}"
    rows: dict[tuple[str | None, str], dict[int, str]] = {}
    for timed in timed_graphs(manifest):
        figures = timed.figures
        told = f"{microseconds(figures.p50_us)} {figures.ratio:.2f}x"
        rows.setdefault((timed.task, timed.precision), {})[figures.batch] = told
    batches = sorted({batch for cells in rows.values() for batch in cells})
    shown = {task: None for task, _ in rows}
    tasks = list(shown)[: _SHOWN_TASKS + 1]
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    table.add_column("graph", overflow="fold")
    table.add_column("variant", no_wrap=True)
    for batch in batches:
        table.add_column(f"B={batch}", justify="right", no_wrap=True)
    for (task, precision), cells in rows.items():
        if task in tasks:
            table.add_row(task or "all tasks", precision, *(cells.get(batch, "-") for batch in batches))
    yield from _printed(table)
    if len(shown) > len(tasks):
        yield f"… and {len(shown) - len(tasks)} more tasks: report.md shows all"


def _pruning_lines(pruning: tuple[TaskPruning, ...]) -> Iterator[str]:
    """A line per task, the use of its experts for the first tasks that lost one, and what it gained."""
    yield "experts that are hardly used, by the calibration rows; te_runtime runs the graphs in mode pruned:"
    yield from (found_line(found) for found in pruning)
    pruned = [found for found in pruning if found.removed]
    if not pruned:
        return
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    for heading in EXPERT_HEADINGS:
        table.add_column(heading, overflow="fold", justify="right" if "weight" in heading else "left")
    for found in pruned[:_SHOWN_TASKS]:
        for row in expert_rows(found):
            table.add_row(*row)
    yield from _printed(table)
    if len(pruned) > _SHOWN_TASKS:
        yield f"… and {len(pruned) - _SHOWN_TASKS} more tasks: report.md shows all"
    for found in pruned:
        ratios = ", ".join(f"{ratio.ratio:.2f}x B={ratio.batch}" for ratio in found.latencies)
        yield f"{found.task}: latency over its task graph, one thread: {ratios}"


def _cost_table(result: ExportResult) -> list[str]:
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    table.add_column("graph", overflow="fold")
    table.add_column("")
    for heading in COST_HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for costs in result.rewrites.costs:
        for row in cost_rows(costs):
            table.add_row(*row)
    return _printed(table)


def _printed(table: Table) -> list[str]:
    buffer = io.StringIO()
    width = max(_NARROWEST, Console().width)
    Console(file=buffer, width=width, no_color=True, highlight=False, markup=False).print(table)
    return [line.rstrip() for line in buffer.getvalue().splitlines()]


def _ordinary_error(parity: TaskParity) -> float:
    return next(group.max_abs_error for group in parity.prediction.groups if group.group == "ordinary")


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"

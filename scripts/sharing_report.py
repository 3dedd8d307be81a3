"""Tables of a comparison, as Markdown on the terminal, and everything behind them as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from sharing_data import HELD_OUT_SHARE
from sharing_models import Family
from sharing_results import Comparison, Interval, Latency, resampled_t_interval, sample_deviation


def show(console: Console, found: Comparison) -> None:
    """All tables of one data set, each under its title."""
    for steps in found.judged_after:
        after = f"after {steps:,} steps"
        _show(console, f"{found.table}, held-out scores {after}: mean ± deviation", score_table(found, steps))
        _show(
            console,
            f"{found.table}, less hard sharing's {after}: mean ± half of the 95% interval; * leaves out 0",
            difference_table(found, steps),
        )
    _show(
        console,
        f"{found.table}, cost: latency is the median (10% to 90%); its ratio to hard sharing's",
        cost_table(found),
    )
    _show(console, f"{found.table}, TaskExpert's mean routing weights in all seeds", routing_table(found))


def score_table(found: Comparison, steps: int) -> Table:
    table = _markdown("", *(f"{task} ({measure})" for task, measure in found.measures.items()))
    for family in Family:
        values = (found.scores(family, task, steps) for task in found.measures)
        table.add_row(family, *map(_mean_and_deviation, values))
    for name in dict.fromkeys(reference.name for reference in found.references):
        own = [reference.scores for reference in found.references if reference.name == name]
        table.add_row(name, *(_mean_and_deviation([s[task] for s in own]) for task in found.measures))
    return table


def difference_table(found: Comparison, steps: int) -> Table:
    table = _markdown("", *found.measures)
    for family in (each for each in Family if each is not Family.HARD):
        pairs = (found.differences(family, task, steps, over=Family.HARD) for task in found.measures)
        intervals = (resampled_t_interval(each, held_out_share=HELD_OUT_SHARE) for each in pairs)
        table.add_row(family, *map(_shown_interval, intervals))
    return table


def cost_table(found: Comparison) -> Table:
    """Parameters of all tasks together, training time, and latency where it was measured."""
    batches = sorted({entry.batch for entry in found.latencies})
    latency_columns = (f"{batch} row{'' if batch == 1 else 's'}, µs" for batch in batches)
    table = _markdown("", "parameters", "backbone, expert", "training, CPU s", *latency_columns)
    for size in found.sizes:
        seconds = [run.training_cpu_s for run in found.runs if run.family == size.family]
        unused = f" (+ {size.unused_parameters:,} unused)" if size.unused_parameters else ""
        table.add_row(
            size.family,
            f"{size.parameters:,}{unused}",
            f"{size.backbone_dim}, {size.expert_dim}",
            _mean_and_deviation(seconds, digits=1),
            *_latency_cells(found.latencies, size.family),
        )
    for graph in dict.fromkeys(entry.graph for entry in found.latencies):
        if graph not in set(Family):
            table.add_row(graph, "", "", "", *_latency_cells(found.latencies, graph))
    return table


def routing_table(found: Comparison) -> Table:
    """How uneven each task's mean routing weights are."""
    weights = np.array([run.routing for run in found.runs if run.routing is not None])  # (seeds, T, K)
    table = _markdown("", "smallest", "largest", "even share, 1/K")
    for index, task in enumerate(found.measures):
        own = weights[:, index]
        table.add_row(task, f"{own.min():.3f}", f"{own.max():.3f}", f"{1 / own.shape[-1]:.3f}")
    return table


def write_json(path: Path, found: Sequence[Comparison], settings: dict[str, object]) -> None:
    """One object: the settings, and per table every run, reference and turn."""
    tables = [asdict(comparison) for comparison in found]
    path.write_text(json.dumps({"settings": settings, "tables": tables}) + "\n", encoding="utf-8")


def _show(console: Console, title: str, table: Table) -> None:
    console.print(f"**{title}**")
    console.print(table)


def _markdown(*columns: str) -> Table:
    table = Table(box=box.MARKDOWN)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _latency_cells(latencies: Sequence[Latency], graph: str) -> list[str]:
    """`20 (18 to 25); 1.40`: median, 10th and 90th percentile, and the median over that of hard sharing."""
    cells = []
    for batch in sorted({entry.batch for entry in latencies}):
        by_graph = {entry.graph: entry for entry in latencies if entry.batch == batch}
        own, hard = by_graph[graph], by_graph[Family.HARD]
        span = f"{own.p10_us:.0f} to {own.p90_us:.0f}"
        cells.append(f"{own.median_us:.0f} ({span}); {own.median_us / hard.median_us:.2f}")
    return cells


def _mean_and_deviation(values: Sequence[float], *, digits: int = 3) -> str:
    deviation = sample_deviation(values)
    spread = "" if math.isnan(deviation) else f" ± {deviation:.{digits}f}"
    return f"{np.mean(values):.{digits}f}{spread}"


def _shown_interval(interval: Interval) -> str:
    if math.isnan(interval.half_width):
        return f"{interval.mean:+.3f}"
    mark = " *" if interval.excludes_zero else ""
    return f"{interval.mean:+.3f} ± {interval.half_width:.3f}{mark}"

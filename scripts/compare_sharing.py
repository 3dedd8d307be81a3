"""Compares four ways to share parameters between tasks, at equal parameter budgets, on two real tables.

    sharing_models.py    the families, and the widths that meet the budget
    sharing_data.py      the tables and how they are split
    sharing_training.py  how every model is trained and judged
    sharing_latency.py   how graphs are timed

A seed draws the split, the initial weights and the order of the rows; families of one seed share the split.
Prints Markdown tables; `--json FILE` keeps every number, `--figure FILE` draws how tasks use the experts.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import onnxruntime
import torch
from rich.console import Console
from sharing_data import HELD_OUT_SHARE, TABLES, Split, Task, load_table, split_table
from sharing_heatmap import draw_routing
from sharing_latency import measure_latencies
from sharing_models import BACKBONE_OVER_EXPERT, DROPOUT, EXPERTS, Family, Size, find_size
from sharing_report import show, write_json
from sharing_results import Comparison, Latency
from sharing_training import TrainingOptions, reference_scores, run_family

OUTPUT_FILE = click.Path(dir_okay=False, path_type=Path)
BUDGET = 40_000
QUICK_STEPS = (10, 20)
WARM_STEPS = (5,)
TABLE_WIDTH = 160
"""As wide as the widest table: rich would cut names off in a narrow terminal."""


@dataclass(frozen=True)
class ComparisonOptions:
    """What is the same for all tables.

    Attributes:
        seeds: how many, counted from 0.
        timing_seconds: for each batch size; None where latency is not measured.
    """

    seeds: int
    training: TrainingOptions
    budget: int = BUDGET
    timing_seconds: float | None = 2.0


def compare(name: str, options: ComparisonOptions, tell: Callable[[str], None]) -> Comparison:
    """Everything on one table."""
    table = load_table(name)
    input_dim = table.inputs.shape[1]
    sizes = [
        find_size(family, input_dim=input_dim, tasks=table.tasks, budget=options.budget) for family in Family
    ]
    warm_up(sizes, split_table(table, 0), table.tasks)
    runs, references, models = [], [], {}
    for seed in range(options.seeds):
        split = split_table(table, seed)
        references += reference_scores(split, table.tasks, seed)
        turn = seed % len(sizes)  # so that no family is always trained first
        for size in sizes[turn:] + sizes[:turn]:
            run, model = run_family(size, split, table.tasks, options=options.training, seed=seed)
            runs.append(run)
            models[size.family] = model
            tell(f"{name}, seed {seed}, {size.family}: {run.training_cpu_s:.1f} s")
    latencies: list[Latency] = []
    if options.timing_seconds is not None:
        tell(f"{name}: exporting and timing")
        in_order = {family: models[family] for family in Family}
        latencies = measure_latencies(in_order, split.held_out.x, seconds=options.timing_seconds)
    return Comparison(
        table=name,
        inputs=input_dim,
        training_rows=len(split.training.x),
        held_out_rows=len(split.held_out.x),
        measures={task.name: task.measure for task in table.tasks},
        sizes=sizes,
        runs=runs,
        references=references,
        latencies=latencies,
    )


def warm_up(sizes: Sequence[Size], split: Split, tasks: Sequence[Task]) -> None:
    """A few steps of each family, thrown away: torch's first ones take as long as hundreds of later ones."""
    for size in sizes:
        run_family(size, split, tasks, options=TrainingOptions(judged_after=WARM_STEPS), seed=0)


def settings_of(options: ComparisonOptions) -> dict[str, object]:
    """What the numbers were made with."""
    return {
        **asdict(options),
        "held_out_share": HELD_OUT_SHARE,
        "experts": EXPERTS,
        "dropout": DROPOUT,
        "backbone_over_expert": BACKBONE_OVER_EXPERT,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, one thread",
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def path_in_a_folder(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Refuses what could not be written once everything has run."""
    if path is not None and not path.parent.is_dir():
        raise click.BadParameter(f"no such folder: {path.parent}")
    return path


@click.command(help="Compare four ways to share parameters between tasks, at equal parameter budgets.")
@click.option("--seeds", type=click.IntRange(1, 100), default=5, show_default=True, help="how many, from 0")
@click.option(
    "--data",
    "tables",
    type=click.Choice(list(TABLES)),
    multiple=True,
    default=list(TABLES),
    show_default=True,
    help="repeat for more",
)
@click.option(
    "--json", "json_path", type=OUTPUT_FILE, callback=path_in_a_folder, help="keep every number here"
)
@click.option(
    "--figure", type=OUTPUT_FILE, callback=path_in_a_folder, help="draw the routing weights here, a PNG"
)
@click.option("--quick", is_flag=True, help="one seed, a few steps, no latencies: whether it works")
def main(
    seeds: int, tables: tuple[str, ...], json_path: Path | None, figure: Path | None, quick: bool
) -> None:
    console = Console(highlight=False, width=TABLE_WIDTH)
    progress = Console(highlight=False, soft_wrap=True, stderr=True)
    torch.set_num_threads(1)  # layers this small gain little from a second thread
    options = ComparisonOptions(seeds=seeds, training=TrainingOptions())
    if quick:
        training = replace(options.training, judged_after=QUICK_STEPS)
        options = replace(options, seeds=1, training=training, timing_seconds=None)
    began_s = time.perf_counter()
    found = []
    for name in dict.fromkeys(tables):
        found.append(compare(name, options, lambda text: progress.print(f"compare: {text}")))
        show(console, found[-1])
    if json_path is not None:
        write_json(json_path, found, settings_of(options))
    if figure is not None:
        draw_routing(found, figure)
    progress.print(f"compare: done in {time.perf_counter() - began_s:.0f} s")


if __name__ == "__main__":
    main()

"""The command `te-runtime bench`."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from te_runtime.cli_group import Outcome, json_outcome, text_outcome
from te_runtime.cli_options import choose_cuda, load_options, report_options
from te_runtime.plan import Mode

__all__ = ["bench"]

INTERRUPTED_EXIT_CODE = 130


@click.command(short_help="How fast a bundle is on this machine, and how much memory it takes.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--scenario",
    "scenarios",
    multiple=True,
    metavar="NAME",
    help="What to measure: single-stream, multi-stream, offline or server; repeat for more.  "
    "[default: single-stream and offline]",
)
@click.option(
    "--batch",
    "batches",
    metavar="LIST",
    default="1,8,64",
    show_default=True,
    help="Rows per call in scenario offline, with commas between.",
)
@click.option(
    "--duration",
    "duration_s",
    type=float,
    metavar="SECONDS",
    default=2.0,
    show_default=True,
    help="How long each measurement takes; server takes up to 20 of them.",
)
@click.option(
    "--p99-ms",
    type=float,
    metavar="MS",
    help="Scenario server: what 99 of 100 queries must keep, in milliseconds from arrival to answer.",
)
@click.option(
    "--compare",
    metavar="OTHER",
    type=click.Path(path_type=Path),
    help="A second bundle, loaded the same way: both take turns call by call, and the ratio is told.",
)
@click.option(
    "--compare-precision",
    metavar="NAME",
    help="Compare with this variant, of OTHER or of BUNDLE itself.  [default: as the first]",
)
@click.option(
    "--compare-mode",
    type=click.Choice(get_args(Mode)),
    help="Compare with these graphs, of OTHER or of BUNDLE itself.  [default: as the first]",
)
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="Only this task; repeat for more.")
@click.option(
    "--seed",
    type=click.IntRange(0),
    metavar="N",
    default=0,
    show_default=True,
    help="Of the random arrivals in scenario server.",
)
@click.option(
    "--mode",
    type=click.Choice(get_args(Mode)),
    help="Which graphs to open, as in te-runtime run.  [default: split, or joint for a single task]",
)
@load_options
@report_options
def bench(
    bundle: Path,
    scenarios: tuple[str, ...],
    batches: str,
    duration_s: float,
    p99_ms: float | None,
    compare: Path | None,
    compare_precision: str | None,
    compare_mode: Mode | None,
    tasks: tuple[str, ...],
    seed: int,
    mode: Mode | None,
    precision: str | None,
    provider: str,
    device: int | None,
    threads: int | None,
    as_json: bool,
) -> Outcome:
    """Measure how fast BUNDLE answers on this machine, and how much memory it takes.

    The scenarios are those of MLPerf: single-stream, one row after another; multi-stream, queries of eight rows;
    offline, many rows a call; server, rows that arrive at random, at the highest rate that keeps --p99-ms. Each
    warms up first. Runs that are not steady are called noisy. Ctrl-C prints what was measured until then.

    \b
    Examples:
      te-runtime bench model-onnx
      te-runtime bench model-onnx --scenario server --p99-ms 5 --duration 10
      te-runtime bench model-onnx --precision int8 --compare-precision fp32
      te-runtime bench model-onnx --compare other-onnx --task click
    """
    from te_runtime.bench_clock import LocalClock
    from te_runtime.bench_json import bench_json
    from te_runtime.bench_options import LoadOptions, Other, parse_bench_options
    from te_runtime.bench_page import page_width
    from te_runtime.bench_progress import choose_progress
    from te_runtime.bench_run import run_bench
    from te_runtime.bench_text import bench_text
    from te_runtime.providers import parse_provider

    options = parse_bench_options(
        scenarios=scenarios,
        batches=batches,
        duration_s=duration_s,
        tasks=tasks,
        p99_ms=p99_ms,
        seed=seed,
        compare=Other(compare, compare_precision, compare_mode),
    )
    asked = parse_provider(provider)
    load = LoadOptions(asked, choose_cuda(asked, device), precision, threads, mode)
    report = run_bench(bundle, load, options, clock=LocalClock(), progress=choose_progress())
    exit_code = INTERRUPTED_EXIT_CODE if report.is_interrupted else 0
    if as_json:
        return json_outcome(bench_json(report), exit_code)
    return text_outcome(bench_text(report, page_width()), exit_code)

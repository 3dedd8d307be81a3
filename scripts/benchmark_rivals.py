"""Measures te-export beside its rivals, interleaved in one run: R and a trained model, one task and all tasks.

    rivals_plan.py       at which models, batch sizes and threads
    rivals_models.py     the models, and what float64 torch answers
    rivals_graphs.py     the graphs that are made of them
    rivals_subjects.py   who is measured; how each is opened stands in a file by its name
    rivals_parity.py     whose answers are right
    rivals_timing.py     turns, rounds, warming up
    rivals_run.py        all of it in order
    rivals_results.py    samples and ratios
    rivals_losses.py     where a rival is faster
    rivals_page.py, rivals_plots.py

Rivals are optional: one that is not installed, fails or answers wrongly is named, with the reason. Prints Markdown; `--page
FILE` writes it there with plots beside it, `--json FILE` keeps every sample.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path

import click
import onnxruntime
import torch
from rich.console import Console
from rivals_page import write_page
from rivals_plan import Plan, make_plan
from rivals_plots import Figure, draw_figures, is_installed
from rivals_results import Absence, Results, read_json, write_json
from rivals_run import run_plan

from te_runtime.bench_environment import read_environment
from te_runtime.errors import ProviderError
from te_runtime.providers import choose_provider

OUTPUT_FILE = click.Path(dir_okay=False, path_type=Path)
INPUT_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OPTIONAL = ("onnxslim", "openvino", "matplotlib")
INTERRUPTED = 130


def find_cuda(device: str) -> tuple[bool, str]:
    """Whether to measure on CUDA too, and why or why not.

    Args:
        device: `cpu`, `cuda`, or `auto` for CUDA as well where a graph runs there.

    Raises:
        ProviderError: CUDA was asked for and does not work.
    """
    choice = choose_provider(device)
    return choice.provider == "cuda", f"{choice.device}" if choice.device else choice.reason


def describe(plan: Plan, *, quick: bool, cuda: str) -> dict[str, str]:
    """What the figures were made with; tells nothing of where on the machine."""
    found = read_environment()
    features = ", ".join(name for name, is_there in found.cpu.features.items() if is_there)
    return {
        "command": f"scripts/benchmark rivals{' --quick' if quick else ''}",
        "CPU": f"{found.cpu.model}, {found.cpu.usable} of {found.cpu.total} CPUs ({features})",
        "CUDA": cuda,
        "load before": "unknown" if found.load_average is None else f"{found.load_average:.1f}",
        "system": f"{platform.system()} {platform.machine()}, Python {found.python}",
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "onnx": importlib.metadata.version("onnx"),
        **{name: _version(name) for name in OPTIONAL},
        "points": str(plan.point_count),
        "seconds per point": f"{plan.seconds:g}",
        "least rounds": str(plan.least_rounds),
    }


def publish(results: Results, page: Path | None) -> str:
    """The page, with figures where it has a place; the text."""
    figures: list[Figure] = []
    if page is not None:
        if is_installed():
            figures = draw_figures(results, page)
        else:
            reason = "matplotlib is not installed: pip install -c constraints.txt -e '.[rivals]' installs it"
            results.absences.append(Absence("plots", "this page", reason))
    text = write_page(results, figures)
    if page is not None:
        page.write_text(text, encoding="utf-8")
    return text


def path_in_a_folder(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Refuses what could not be written once everything has run."""
    if path is not None and not path.parent.is_dir():
        raise click.BadParameter(f"no such folder: {path.parent}")
    return path


@click.command(
    help="Measure te-export beside torch, ONNX Runtime, onnxslim and OpenVINO, in one interleaved run."
)
@click.option("--quick", is_flag=True, help="a few points of the plan, a few seconds each: whether it works")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="auto: CUDA as well, where a graph runs there")  # fmt: skip
@click.option(
    "--json", "json_path", type=OUTPUT_FILE, callback=path_in_a_folder, help="keep every sample here"
)
@click.option("--page", type=OUTPUT_FILE, callback=path_in_a_folder,
              help="write the page here, such as docs/rivals.md, and plots beside it")  # fmt: skip
@click.option("--from-json", type=INPUT_FILE, help="measure nothing: make the page of samples kept earlier")
def main(quick: bool, device: str, json_path: Path | None, page: Path | None, from_json: Path | None) -> None:
    progress = Console(highlight=False, soft_wrap=True, stderr=True)
    if from_json is not None:
        text = publish(read_json(from_json), page)
        click.echo(f"wrote {page}" if page else text)
        return
    began_s = time.perf_counter()

    def tell(message: str) -> None:
        progress.print(f"rivals: {time.perf_counter() - began_s:4.0f} s  {message}", markup=False)

    try:
        has_cuda, cuda = find_cuda(device)
    except ProviderError as error:
        raise click.UsageError(str(error)) from error
    plan = make_plan(quick=quick, has_cuda=has_cuda)
    results = Results(settings=describe(plan, quick=quick, cuda=cuda))
    exit_code = 0
    try:
        run_plan(plan, results, tell)
    except KeyboardInterrupt:
        exit_code = INTERRUPTED
        reason = f"interrupted after {len(results.points())} of {plan.point_count} points"
        results.absences.append(Absence("everybody", "the rest of the plan", reason))
        tell(reason)
    results.settings["load after"] = f"{os.getloadavg()[0]:.1f}"
    results.settings["took"] = f"{(time.perf_counter() - began_s) / 60:.0f} min"
    if json_path is not None:
        write_json(json_path, results)
    text = publish(results, page)
    if page is None:
        click.echo(text)
    tell("done" if exit_code == 0 else "kept what there was")
    raise SystemExit(exit_code)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()

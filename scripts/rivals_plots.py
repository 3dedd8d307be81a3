"""Plots of the ratios to naive: by batch size, by number of tasks, by number of experts; bars from the 10th to the 90th
percentile of rounds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rivals_plan import BASE, Family, Point, Scope
from rivals_results import Measured, Ratio, Results, take_ratio
from rivals_subjects import Role

PANEL_INCHES = (6.4, 4.6)
DOTS_PER_INCH = 110
SWEEP_BATCHES = (1, 64)
STYLES = {
    "te-export graph": ("#0b5fa5", "o"),
    "te_runtime, split": ("#0a8f6a", "s"),
    "te-export graph, int8": ("#5a3fb0", "D"),
    "te-export graph, in OpenVINO float32": ("#6fa8d6", "o"),
    "torch.onnx, all tasks in one graph": ("#c2185b", "^"),
    "torch eager": ("#b0522a", "v"),
    "torch.compile": ("#d08000", "P"),
    "onnxslim": ("#8a8a8a", "*"),
    "OpenVINO, float32": ("#7a6a00", "X"),
    "OpenVINO, bfloat16": ("#404040", "<"),
    "roof": ("#000000", "."),
}
OTHER_STYLE = ("#bbbbbb", "x")


@dataclass(frozen=True)
class Figure:
    """A PNG, and what it shows in a sentence."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Axis:
    """What is drawn from left to right."""

    name: str
    label: str
    of: Callable[[Point], int]


BATCH = Axis("batch", "batch size B", lambda point: point.batch)
TASKS = Axis("tasks", "number of tasks T", lambda point: point.model.tasks)
EXPERTS = Axis("experts", "number of experts K", lambda point: point.model.experts)


@dataclass(frozen=True)
class Panel:
    """One plot: points that differ in what the axis shows."""

    title: str
    scope: Scope
    points: tuple[Point, ...]


def draw_figures(results: Results, page: Path) -> list[Figure]:
    """Writes PNGs beside the page, named after it, for whatever has two points or more to join."""
    figures = []
    for axis, caption, panels in _wanted(results):
        drawn = [panel for panel in panels if len(_positions(results, axis, panel)) > 1]
        if drawn:
            path = page.with_name(f"{page.stem}-{axis.name}.png")
            _draw(results, axis, drawn, path)
            figures.append(Figure(path, caption))
    return figures


def _wanted(results: Results) -> list[tuple[Axis, str, list[Panel]]]:
    points = [point for point in results.points() if point.device == "cpu" and point.threads == 1]
    base = tuple(point for point in points if point.model == BASE)
    drawn = [point for point in points if point.model.family is Family.R]
    tasks = [point for point in drawn if point.model.experts == BASE.experts]
    experts = [point for point in drawn if point.model.tasks == BASE.tasks]
    of_base = f"{BASE.label}, 1 thread"
    return [
        (
            BATCH,
            f"Latency over naive by batch size, {of_base}",
            [Panel(f"{scope}, {of_base}", scope, base) for scope in Scope],
        ),
        (
            TASKS,
            "Latency over a naive session per task by number of tasks, R, K = 8, 1 thread",
            _sweep(tasks, Scope.ALL_TASKS, "all tasks, R, K = 8"),
        ),
        (
            EXPERTS,
            "Latency over naive by number of experts, one task of R, T = 5, 1 thread",
            _sweep(experts, Scope.ONE_TASK, "one task, R, T = 5"),
        ),
    ]


def _sweep(points: Sequence[Point], scope: Scope, title: str) -> list[Panel]:
    return [
        Panel(f"{title}, B = {batch}, 1 thread", scope, tuple(p for p in points if p.batch == batch))
        for batch in SWEEP_BATCHES
    ]


def _draw(results: Results, axis: Axis, panels: Sequence[Panel], path: Path) -> None:
    # Imported here, without pyplot: matplotlib is only needed to draw, and pyplot would look for a screen.
    from matplotlib.figure import Figure as Canvas

    width, height = PANEL_INCHES
    canvas = Canvas(
        figsize=(width, height * len(panels)), dpi=DOTS_PER_INCH, layout="constrained", facecolor="white"
    )
    for place, panel in zip(canvas.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        _draw_panel(place, results, axis, panel)
    canvas.savefig(path)


def _draw_panel(place: Any, results: Results, axis: Axis, panel: Panel) -> None:
    place.axhline(1, color="#666666", linewidth=1, linestyle="--")
    subjects = {
        entry.subject: entry
        for point in panel.points
        for entry in results.at(point, panel.scope)
        if entry.role is not Role.NAIVE
    }
    for name, entry in subjects.items():
        found = _ratios(results, axis, panel, name)
        positions = [position for position, _ in found]
        medians = [ratio.median for _, ratio in found]
        spread = [[r.median - r.low for _, r in found], [r.high - r.median for _, r in found]]
        place.errorbar(
            positions,
            medians,
            yerr=spread,
            label=name,
            capsize=3,
            elinewidth=0.8,
            markersize=5,
            **_style(entry),
        )
    ticks = _positions(results, axis, panel)
    place.set_xscale("log")
    place.set_yscale("log")
    place.set_xticks(ticks, [str(tick) for tick in ticks])
    place.minorticks_off()
    place.set_yticks(*_ratio_ticks(place.get_ylim()))
    place.set_xlabel(axis.label)
    of_all = "" if panel.scope is Scope.ONE_TASK else ", a session per task"
    place.set_ylabel(f"latency over naive{of_all} (lower is better)")
    place.set_title(panel.title, fontsize=10)
    place.grid(visible=True, axis="y", color="#dddddd", linewidth=0.6)
    place.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _positions(results: Results, axis: Axis, panel: Panel) -> list[int]:
    """Where the axis has something to show."""
    return sorted({axis.of(p) for p in panel.points if results.naive(p, panel.scope) is not None})


def _ratio_ticks(limits: tuple[float, float]) -> tuple[list[float], list[str]]:
    """Plain numbers on a logarithmic axis."""
    ticks = [step * 10.0**power for power in range(-3, 4) for step in (1, 2, 5)]
    kept = [tick for tick in ticks if limits[0] <= tick <= limits[1]]
    return kept, [f"{tick:g}" for tick in kept]


def _ratios(results: Results, axis: Axis, panel: Panel, name: str) -> list[tuple[int, Ratio]]:
    found = []
    for point in panel.points:
        naive = results.naive(point, panel.scope)
        entries = [entry for entry in results.at(point, panel.scope) if entry.subject == name]
        if naive is not None and entries:
            found.append((axis.of(point), take_ratio(entries[0], naive)))
    return sorted(found, key=lambda pair: pair[0])


def _style(entry: Measured) -> dict[str, object]:
    """The same in every plot: ours drawn strong, rivals thinner, the roof dotted."""
    stem = re.sub(r"(task|joint) graph", "graph", entry.subject).removesuffix(", a session per task")
    color, marker = STYLES.get(stem, OTHER_STYLE)
    return {
        "color": color,
        "marker": marker,
        "linewidth": 2.2 if entry.role is Role.OURS else 1.1,
        "linestyle": ":" if entry.role is Role.ROOF else "-",
    }


def is_installed() -> bool:
    """Whether anything can be drawn."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None

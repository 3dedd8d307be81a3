"""Keeping those layers of a variant in float32 (in int4: in 8 bits) that a task cannot spare, by measuring.

    convert all → every task within budget: done
                → else convert all but one unit, for each unit; keep the unit that helps the missing tasks
                  most, then the next, until every task is within budget or nothing converted is left

A unit is what is kept or converted together: the layers of one joint graph at the same depth, of the same
shape, that reach the same tasks, such as the second layers of all experts.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from te_export.precision.accuracy import TaskAccuracy
from te_export.precision.evaluation import Evaluation
from te_export.precision.form import Form
from te_export.precision.layers import linear_layers, weight_names
from te_export.precision.trial import open_trial

__all__ = ["Repaired", "repair"]


@dataclass(frozen=True)
class Repaired:
    """A form with what it has to leave in float32.

    Attributes:
        kept: weights whose layers are held as the form's `kept_as`.
        converted: weights that were converted; empty where nothing could be.
        figures: by task, over the rows of the evaluation.
        misses: tasks that are over budget even so.
        before: the figures with everything converted.
    """

    form: Form
    kept: frozenset[str]
    converted: tuple[str, ...]
    figures: Mapping[str, TaskAccuracy]
    misses: tuple[str, ...]
    before: Mapping[str, TaskAccuracy]


@dataclass(frozen=True)
class _Trial:
    converted: tuple[str, ...]
    figures: Mapping[str, TaskAccuracy]
    misses: tuple[str, ...]


def repair(form: Form, joint: ir.Model, evaluation: Evaluation, scratch: Path) -> Repaired:
    """Convert as much of the joint graph as the budget of every task allows.

    Args:
        form: how to convert.
        joint: the float32 joint graph; it stays as it is.
        scratch: a folder for graphs that are tried.

    Raises:
        BundleError: onnxruntime refuses a converted graph.
        GateError: the form cannot convert the graph.
    """
    first = found = _try(form, joint, frozenset(), evaluation, scratch)
    kept: frozenset[str] = frozenset()
    if found.misses:
        for unit in _by_need(form, joint, evaluation, first, scratch):
            kept |= unit
            found = _try(form, joint, kept, evaluation, scratch)
            if not found.misses or not found.converted:
                break
    return Repaired(form, kept, found.converted, found.figures, found.misses, first.figures)


def _try(form: Form, joint: ir.Model, kept: frozenset[str], evaluation: Evaluation, scratch: Path) -> _Trial:
    model = joint.clone()
    converted = form.convert(model, kept)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        figures = evaluation.measure(open_trial(model, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _Trial(converted, figures, evaluation.misses(figures))


def _by_need(
    form: Form, joint: ir.Model, evaluation: Evaluation, first: _Trial, scratch: Path
) -> list[frozenset[str]]:
    """The units, those first that take most off the missing tasks' error when they alone stay in float32."""

    def error_without(unit: frozenset[str]) -> float:
        figures = _try(form, joint, unit, evaluation, scratch).figures
        return math.fsum(figures[task].relative_error for task in first.misses)

    units = [unit for unit in _units(joint.graph) if unit & set(first.converted)]
    return sorted(units, key=error_without)


def _units(graph: ir.Graph) -> list[frozenset[str]]:
    """The weights of each unit, in the order of the graph."""
    depths = _depths(graph)
    reached = _tasks_reached(graph)
    units: dict[tuple[object, ...], set[str]] = {}
    for linear in linear_layers(graph):
        key = (depths[linear.node], linear.width_in, linear.width_out, reached[linear.node])
        units.setdefault(key, set()).update(weight_names(linear))
    return [frozenset(unit) for unit in units.values()]


def _depths(graph: ir.Graph) -> dict[ir.Node, int]:
    """For each node, the most Gemm and MatMul nodes on a way from an input to it."""
    depths: dict[ir.Node, int] = {}
    for node in graph:
        producers = (value.producer() for value in node.inputs if value is not None)
        before = max((depths[producer] for producer in producers if producer is not None), default=0)
        depths[node] = before + (node.op_type in ("Gemm", "MatMul"))
    return depths


def _tasks_reached(graph: ir.Graph) -> dict[ir.Node, frozenset[str]]:
    """For each node, the graph's outputs that depend on it."""
    reached: dict[ir.Node, frozenset[str]] = {}
    for node in reversed(graph):
        found: set[str] = set()
        for value in node.outputs:
            if value.is_graph_output():
                found.add(str(value.name))
            for user, _ in value.uses():
                found |= reached[user]
        reached[node] = frozenset(found)
    return reached

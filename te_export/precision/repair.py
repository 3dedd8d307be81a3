"""Keeping those layers of a variant in float32 (in int4: in 8 bits) that a task cannot spare, by measuring.

    convert all → every task within budget: done
                → else convert all but one unit, for each unit; keep the unit that helps the missing tasks
                  most, then the next, until every task is within budget or nothing converted is left

A unit is what units.py says: layers that are kept or converted together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from te_export.precision.accuracy import TaskAccuracy
from te_export.precision.evaluation import Evaluation
from te_export.precision.form import Form
from te_export.precision.form_trial import Trial, try_form
from te_export.precision.units import layer_units

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
        spared: for the units that were tried, the figures with everything converted but that unit.
    """

    form: Form
    kept: frozenset[str]
    converted: tuple[str, ...]
    figures: Mapping[str, TaskAccuracy]
    misses: tuple[str, ...]
    before: Mapping[str, TaskAccuracy]
    spared: Mapping[frozenset[str], Mapping[str, TaskAccuracy]] = field(default_factory=dict)


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
    first = found = try_form(form, joint, frozenset(), evaluation, scratch)
    kept: frozenset[str] = frozenset()
    spared: dict[frozenset[str], Mapping[str, TaskAccuracy]] = {}
    if found.misses:
        spared = _spare_each(form, joint, evaluation, first, scratch)
        for unit in sorted(spared, key=lambda unit: _error_of(spared[unit], first.misses)):
            kept |= unit
            found = try_form(form, joint, kept, evaluation, scratch)
            if not found.misses or not found.converted:
                break
    return Repaired(form, kept, found.converted, found.figures, found.misses, first.figures, spared)


def _spare_each(
    form: Form, joint: ir.Model, evaluation: Evaluation, first: Trial, scratch: Path
) -> dict[frozenset[str], Mapping[str, TaskAccuracy]]:
    """For each unit of which something was converted, the figures when it alone stays as `kept_as`."""
    return {
        unit: try_form(form, joint, unit, evaluation, scratch).figures
        for unit in layer_units(joint.graph)
        if unit & set(first.converted)
    }


def _error_of(figures: Mapping[str, TaskAccuracy], tasks: tuple[str, ...]) -> float:
    return math.fsum(figures[task].relative_error for task in tasks)

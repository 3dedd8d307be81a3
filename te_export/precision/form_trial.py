"""Trying a form: a joint graph converted in a scratch folder, and what every task loses in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from te_export.precision.accuracy import TaskAccuracy
from te_export.precision.evaluation import Evaluation
from te_export.precision.form import Form
from te_export.precision.trial import open_trial

__all__ = ["Trial", "try_form"]


@dataclass(frozen=True)
class Trial:
    """What came of it.

    Attributes:
        converted: weights that were converted.
        figures: by task, over the rows of the evaluation.
        misses: tasks that are over budget.
    """

    converted: tuple[str, ...]
    figures: Mapping[str, TaskAccuracy]
    misses: tuple[str, ...]


def try_form(
    form: Form, joint: ir.Model, kept: frozenset[str], evaluation: Evaluation, scratch: Path
) -> Trial:
    """Convert a copy of the joint graph but for the layers of `kept`, and judge it.

    Raises:
        BundleError: onnxruntime refuses the converted graph.
        GateError: the form cannot convert the graph.
    """
    model = joint.clone()
    converted = form.convert(model, kept)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        figures = evaluation.measure(open_trial(model, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Trial(converted, figures, evaluation.misses(figures))

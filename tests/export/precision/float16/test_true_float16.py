"""float16 as a GPU computes it: what overflows there is found here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from te_export.errors import AccuracyError
from te_export.models.input_rows import InputRows
from te_export.partition import GraphSet
from te_export.precision.evaluation import Evaluation, first_rows, probe_evaluation
from te_export.precision.float16.half_precision import HalfPrecision
from te_export.precision.float16.true_float16 import check_true_float16
from te_export.verify.references import References

MakeGraphs = Callable[..., GraphSet]


@pytest.fixture(scope="module")
def evaluation(wide_references: References) -> Evaluation:
    return probe_evaluation(wide_references)


def test_ordinary_rows_pass(wide_graphs: MakeGraphs, evaluation: Evaluation) -> None:
    joint = wide_graphs().joint.clone()
    HalfPrecision().convert(joint, frozenset())

    check_true_float16(joint, evaluation)


def test_a_value_beyond_float16_is_found_though_onnxruntime_stays_finite(
    wide_graphs: MakeGraphs, evaluation: Evaluation
) -> None:
    joint = wide_graphs().joint.clone()
    HalfPrecision().convert(joint, frozenset())
    large = replace(evaluation, x=InputRows({"x": evaluation.x.arrays["x"] * np.float32(1e6)}))

    with pytest.raises(AccuracyError, match=r"fp16 is left out.*task_0 leaves inf points.*65504"):
        check_true_float16(joint, large)


def test_another_answer_is_found(wide_graphs: MakeGraphs, evaluation: Evaluation) -> None:
    joint = wide_graphs().joint.clone()
    HalfPrecision().convert(joint, frozenset())
    moved = replace(evaluation, x=InputRows({"x": np.roll(evaluation.x.arrays["x"], 1, axis=0)}))

    with pytest.raises(AccuracyError, match="points of its variance unexplained over 64 rows"):
        check_true_float16(joint, moved)


def test_first_rows_are_the_first_without_labels(evaluation: Evaluation) -> None:
    few = first_rows(evaluation, 5)

    assert np.array_equal(few.x.arrays["x"], evaluation.x.arrays["x"][:5])
    for name, oracle in few.tasks.items():
        assert np.array_equal(oracle.prediction, evaluation.tasks[name].prediction[:5])
        assert oracle.labels is None
    assert few.budget_points == evaluation.budget_points

"""Every graph of a variant gives what its joint graph gives, as nearly as its arithmetic allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from te_export.bundle.staging import StagedBundle
from te_export.bundle.variant_writer import write_variant
from te_export.errors import ParityError
from te_export.partition import GraphSet
from te_export.precision.block_weights import BlockWeights
from te_export.precision.float16.half_precision import HalfPrecision
from te_export.precision.form import Form
from te_export.verify.parity import verify_graphs, verify_lower_precision
from te_export.verify.references import References
from te_export.verify.tolerance import Tolerance
from te_runtime.manifest import Precision, TaskParity

FORMS: dict[Precision, Callable[[], Form]] = {
    "int8": lambda: BlockWeights(8),
    "int4": lambda: BlockWeights(4),
    "fp16": HalfPrecision,
}


def converted(precision: Precision, graphs: GraphSet) -> GraphSet:
    form = FORMS[precision]()

    def convert(model: ir.Model) -> ir.Model:
        copy = model.clone()
        form.convert(copy, frozenset())
        return copy

    return graphs.changed(convert)


def verified(
    precision: Precision, graphs: GraphSet, references: References, folder: Path
) -> tuple[TaskParity, ...]:
    staged = StagedBundle(folder / "bundle", force=False)
    files = write_variant(staged, graphs, folder=precision, standalone=False)
    return verify_lower_precision(precision, files, references)


@pytest.mark.parametrize("precision", FORMS)
def test_graphs_that_were_converted_alike_agree(
    precision: Precision, wide_graphs: Callable[[], GraphSet], wide_references: References, tmp_path: Path
) -> None:
    found = verified(precision, converted(precision, wide_graphs()), wide_references, tmp_path)

    assert [parity.task for parity in found] == list(wide_references.tasks)
    for parity in found:
        for figures in parity.outputs.values():
            assert all(group.max_abs_error <= group.bound for group in figures.groups)


@pytest.mark.parametrize(("precision", "other"), [("int8", "int4"), ("fp16", "int8")])
def test_a_graph_that_is_coarser_than_its_variant_is_refused_by_name(
    precision: Precision,
    other: Precision,
    wide_graphs: Callable[[], GraphSet],
    wide_references: References,
    tmp_path: Path,
) -> None:
    graphs = converted(precision, wide_graphs())
    foreign = converted(other, wide_graphs()).tasks["task_2"]

    with pytest.raises(ParityError, match="its graphs differ from one another") as caught:
        verified(
            precision,
            replace(graphs, tasks={**graphs.tasks, "task_2": foreign}),
            wide_references,
            tmp_path,
        )

    assert f"task task_2: {precision}/task-task_2.onnx, prediction, ordinary rows" in str(caught.value)
    assert "task_1" not in str(caught.value)


def test_joint_tails_that_are_coarser_than_their_variant_are_refused_by_name(
    wide_graphs: Callable[[], GraphSet], wide_references: References, tmp_path: Path
) -> None:
    graphs = converted("int8", wide_graphs())
    foreign = converted("int4", wide_graphs()).joint_tails

    with pytest.raises(ParityError, match="its graphs differ from one another") as caught:
        verified("int8", replace(graphs, joint_tails=foreign), wide_references, tmp_path)

    assert "int8/joint-tails.onnx, task_" in str(caught.value)
    assert "tail-task" not in str(caught.value)


def test_bounds_are_no_tighter_than_float32s(
    wide_graphs: Callable[[], GraphSet], wide_references: References, tmp_path: Path
) -> None:
    staged = StagedBundle(tmp_path / "bundle", force=False)
    files = write_variant(staged, wide_graphs(), folder="fp32", standalone=False)
    exact = verify_graphs(files, wide_references, Tolerance())

    found = verified("fp16", converted("fp16", wide_graphs()), wide_references, tmp_path)

    for half, whole in zip(found, exact, strict=True):
        for group, other in zip(half.prediction.groups, whole.prediction.groups, strict=True):
            assert group.bound > other.bound

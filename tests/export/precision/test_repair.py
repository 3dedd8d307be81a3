"""Repair finds the layers that a task cannot spare, and says so where nothing helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from te_export.partition import GraphSet
from te_export.precision.block_weights import BlockWeights
from te_export.precision.evaluation import Evaluation, probe_evaluation
from te_export.precision.layers import linear_layers, weight_names
from te_export.precision.repair import repair
from te_export.verify.references import References
from te_runtime.manifest import FormName

MakeGraphs = Callable[..., GraphSet]


class Damaging:
    """A form that multiplies some weights by a factor and leaves the rest alone."""

    name: FormName = "dynamic"
    kept_as = "float32"

    def __init__(self, ruined: frozenset[str], factor: float = -50.0) -> None:
        self._ruined = ruined
        self._factor = np.float32(factor)

    def convert(self, model: ir.Model, kept: frozenset[str]) -> tuple[str, ...]:
        converted: list[str] = []
        for linear in linear_layers(model.graph):
            names = frozenset(weight_names(linear))
            if names & kept:
                continue
            converted += sorted(names)
            if names & self._ruined:
                value = linear.weight
                assert value.const_value is not None
                value.const_value = ir.tensor(value.const_value.numpy() * self._factor, name=value.name)
        return tuple(converted)


@pytest.fixture(scope="module")
def evaluation(wide_references: References) -> Evaluation:
    return probe_evaluation(wide_references)


def units_of(graph: ir.Graph) -> list[frozenset[str]]:
    return [frozenset(weight_names(linear)) for linear in linear_layers(graph)]


def test_within_budget_nothing_is_kept(
    wide_graphs: MakeGraphs, evaluation: Evaluation, tmp_path: Path
) -> None:
    found = repair(BlockWeights(8), wide_graphs().joint, evaluation, tmp_path)

    assert found.kept == frozenset()
    assert found.misses == ()
    assert set(found.converted) == set().union(*units_of(wide_graphs().joint.graph))
    assert found.figures == found.before


@pytest.mark.parametrize("unit", [0, 1, -1])
def test_the_ruined_layer_is_found_and_no_other(
    wide_graphs: MakeGraphs, evaluation: Evaluation, tmp_path: Path, unit: int
) -> None:
    joint = wide_graphs().joint
    ruined = units_of(joint.graph)[unit]

    found = repair(Damaging(ruined), joint, evaluation, tmp_path)

    assert ruined <= found.kept
    assert found.misses == ()
    assert found.converted
    assert len(found.kept) < len(set().union(*units_of(joint.graph)))
    assert evaluation.misses(found.before)
    lost = {task: evaluation.loss_points(figures) for task, figures in found.figures.items()}
    assert max(lost.values()) <= evaluation.budget_points


def test_what_is_kept_reaches_a_task_that_missed(
    wide_graphs: MakeGraphs, evaluation: Evaluation, tmp_path: Path
) -> None:
    """Layers of one task's own tail are not paid for by keeping the trunk."""
    joint = wide_graphs("none").joint
    own = [unit for unit in units_of(joint.graph) if all("gating_networks.1" in name for name in unit)]
    assert own

    found = repair(Damaging(own[0]), joint, evaluation, tmp_path)

    assert found.kept == own[0]
    assert evaluation.misses(found.before) == ("task_1",)


def test_a_budget_of_nothing_leaves_nothing_converted(
    wide_graphs: MakeGraphs, evaluation: Evaluation, tmp_path: Path
) -> None:
    found = repair(BlockWeights(8), wide_graphs().joint, replace(evaluation, budget_points=0.0), tmp_path)

    assert found.converted == ()
    assert found.kept == set().union(*units_of(wide_graphs().joint.graph))


def test_answers_that_are_not_finite_never_pass(
    wide_graphs: MakeGraphs, evaluation: Evaluation, tmp_path: Path
) -> None:
    joint = wide_graphs().joint
    everything = frozenset().union(*units_of(joint.graph))

    found = repair(Damaging(everything, float("inf")), joint, evaluation, tmp_path)

    assert found.converted == ()


def test_scratch_is_empty_again(wide_graphs: MakeGraphs, evaluation: Evaluation, tmp_path: Path) -> None:
    repair(Damaging(units_of(wide_graphs().joint.graph)[0]), wide_graphs().joint, evaluation, tmp_path)

    assert not list(tmp_path.iterdir())

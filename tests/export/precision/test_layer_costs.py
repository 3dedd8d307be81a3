"""What each layer costs is found by sparing it, for the task it costs most, and within a bound on the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from te_export.partition import GraphSet
from te_export.precision import layer_costs as module
from te_export.precision.accuracy import TaskAccuracy
from te_export.precision.block_weights import BlockWeights
from te_export.precision.evaluation import Evaluation, probe_evaluation
from te_export.precision.float16.half_precision import HalfPrecision
from te_export.precision.form import Form
from te_export.precision.form_trial import Trial, try_form
from te_export.precision.layer_costs import layer_costs, most_trials
from te_export.precision.layers import linear_layers, weight_names
from te_export.precision.repair import Repaired, repair
from te_export.verify.references import References
from te_runtime.manifest import FormName, LayerAccuracy

MakeGraphs = Callable[..., GraphSet]
TASKS = ("task_0", "task_1", "task_2")


class Disturbing:
    """A form that multiplies some weights, each part of a stack by itself, and says that it converts all."""

    name: FormName = "dynamic"
    kept_as = "float32"

    def __init__(self, factors: Mapping[str, float]) -> None:
        self._factors = factors

    def convert(self, model: ir.Model, kept: frozenset[str]) -> tuple[str, ...]:
        converted: list[str] = []
        for linear in linear_layers(model.graph):
            names = weight_names(linear)
            if kept & set(names):
                continue
            converted += names
            value = linear.weight
            assert value.const_value is not None
            parts = np.split(
                value.const_value.numpy(), len(names)
            )  # those of one stack are as tall as one another
            scaled = [
                part * np.float32(self._factors.get(name, 1.0))
                for name, part in zip(names, parts, strict=True)
            ]
            value.const_value = ir.tensor(np.concatenate(scaled), name=value.name)
        return tuple(converted)


@pytest.fixture(scope="module")
def evaluation(wide_references: References) -> Evaluation:
    return replace(probe_evaluation(wide_references), budget_points=1e9)


def costs(
    form: Form, graphs: GraphSet, evaluation: Evaluation, scratch: Path
) -> tuple[Repaired, tuple[LayerAccuracy, ...]]:
    found = repair(form, graphs.joint, evaluation, scratch)
    return found, layer_costs(found, graphs, evaluation, scratch)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[frozenset[str]]:
    """What was spared in each trial that is made for the costs alone."""
    seen: list[frozenset[str]] = []

    def counting(
        form: Form, joint: ir.Model, kept: frozenset[str], evaluation: Evaluation, scratch: Path
    ) -> Trial:
        seen.append(kept)
        return try_form(form, joint, kept, evaluation, scratch)

    monkeypatch.setattr(module, "try_form", counting)
    return seen


def test_every_converted_weight_stands_in_one_row(
    wide_graphs: MakeGraphs, evaluation: Evaluation, tmp_path: Path
) -> None:
    found, layers = costs(BlockWeights(8), wide_graphs(), evaluation, tmp_path)

    names = [name for layer in layers for name in layer.weights]
    assert sorted(names) == sorted(found.converted)
    assert {layer.held for layer in layers} == {"converted"}
    shapes = {
        part: linear.weight.const_value.size // len(weight_names(linear))
        for linear in linear_layers(wide_graphs().joint.graph)
        if linear.weight.const_value is not None
        for part in weight_names(linear)
    }
    for layer in layers:
        assert layer.parameters == sum(shapes[name] for name in layer.weights)
        assert layer.loss is not None
    assert not list(tmp_path.iterdir())


def test_shared_layers_and_those_of_one_task_are_told_apart(
    wide_graphs: MakeGraphs, evaluation: Evaluation, tmp_path: Path
) -> None:
    """The joint graph stacks the first gate layers of all tasks; each is a layer of its own task all the same."""
    _, layers = costs(BlockWeights(8), wide_graphs(), evaluation, tmp_path)

    own = [layer for layer in layers if any("gating" in name for name in layer.weights)]
    assert [layer.tasks for layer in own] == [(task,) for task in TASKS]
    assert all(layer.loss is not None and layer.loss.task in (layer.tasks or ()) for layer in own)
    assert all(layer.tasks is None for layer in layers if layer not in own)


@pytest.mark.parametrize("level", ["exact", "none"])
def test_the_layer_that_was_disturbed_costs_what_is_lost(
    level: str, wide_graphs: MakeGraphs, evaluation: Evaluation, tmp_path: Path
) -> None:
    graphs = wide_graphs(level)
    name = next(
        name
        for linear in linear_layers(graphs.joint.graph)
        for name in weight_names(linear)
        if "gating_networks.1" in name
    )

    found, layers = costs(Disturbing({name: -3.0}), graphs, evaluation, tmp_path)

    (hit,) = (layer for layer in layers if name in layer.weights)
    assert hit.tasks == ("task_1",)
    assert hit.loss is not None
    assert hit.loss.task == "task_1"
    assert hit.loss.loss_points == evaluation.loss_points(found.before["task_1"])
    assert hit.loss.loss_points > 1e-3
    assert hit.loss.spared_loss_points == pytest.approx(0, abs=1e-6)
    for layer in layers:
        if layer is not hit:
            assert layer.loss is not None
            assert layer.loss.loss_points == pytest.approx(layer.loss.spared_loss_points, rel=1e-9, abs=1e-9)


def test_layers_of_different_tasks_share_a_trial(
    wide_graphs: MakeGraphs, evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spared = counted(monkeypatch)

    _, layers = costs(BlockWeights(8), wide_graphs("none"), evaluation, tmp_path)

    gates = [kept for kept in spared if any("gating" in name for name in kept)]
    assert len(gates) == 1
    assert {name.split(".")[1] for name in gates[0]} == {"0", "1", "2"}
    assert len({layer.loss.loss_points for layer in layers if layer.tasks and layer.loss}) == 3


def test_what_repair_measured_is_not_measured_again(
    wide_graphs: MakeGraphs, wide_references: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = wide_graphs()
    ruined = weight_names(next(linear_layers(graphs.joint.graph)))[0]
    spared = counted(monkeypatch)

    found, layers = costs(Disturbing({ruined: -50.0}), graphs, probe_evaluation(wide_references), tmp_path)

    assert spared == []
    assert found.kept
    assert {name for layer in layers if layer.held == "kept" for name in layer.weights} == found.kept
    (hit,) = (layer for layer in layers if ruined in layer.weights)
    assert hit.held == "kept"
    assert hit.loss is not None
    assert hit.loss.spared_loss_points is not None
    assert hit.loss.loss_points is not None
    assert hit.loss.loss_points > 10 > hit.loss.spared_loss_points


def test_int4_is_held_against_8_bits(wide_graphs: MakeGraphs, evaluation: Evaluation, tmp_path: Path) -> None:
    found, layers = costs(BlockWeights(4), wide_graphs(), evaluation, tmp_path)

    trial = try_form(BlockWeights(4), wide_graphs().joint, frozenset(layers[0].weights), evaluation, tmp_path)
    loss = layers[0].loss
    assert loss is not None
    assert loss.loss_points == evaluation.loss_points(found.before[loss.task])
    assert loss.spared_loss_points == evaluation.loss_points(trial.figures[loss.task])
    assert loss.spared_loss_points < loss.loss_points


def test_fp16_has_rows_for_its_small_weights_too(
    wide_graphs: MakeGraphs, evaluation: Evaluation, tmp_path: Path
) -> None:
    found, layers = costs(HalfPrecision(), wide_graphs(), evaluation, tmp_path)

    large = {name for linear in linear_layers(wide_graphs().joint.graph) for name in weight_names(linear)}
    small = [layer for layer in layers if not large & set(layer.weights)]
    assert {name for layer in layers for name in layer.weights} == set(found.converted)
    assert {layer.tasks for layer in small} == {(task,) for task in TASKS}


def test_the_largest_are_measured_first_where_the_work_is_bounded(
    wide_graphs: MakeGraphs, evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two(rows: int, weight_bytes: int) -> int:
        assert rows == len(evaluation.x)
        assert weight_bytes > 4 * sum(layer.parameters for layer in whole)
        return 2

    _, whole = costs(BlockWeights(8), wide_graphs(), evaluation, tmp_path)
    monkeypatch.setattr(module, "most_trials", two)
    spared = counted(monkeypatch)

    _, layers = costs(BlockWeights(8), wide_graphs(), evaluation, tmp_path)

    assert len(spared) == 2
    measured = [layer for layer in layers if layer.loss is not None]
    assert measured == [layer for layer in whole if set(layer.weights) <= frozenset().union(*spared)]
    assert [layer._replace(loss=None) for layer in layers] == [layer._replace(loss=None) for layer in whole]
    left = [layer.parameters for layer in layers if layer.loss is None]
    assert min(layer.parameters for layer in measured if layer.tasks is None) >= max(left, default=0)


def test_losses_that_are_not_finite_are_told_as_such(
    wide_graphs: MakeGraphs, evaluation: Evaluation, tmp_path: Path
) -> None:
    name = weight_names(next(linear_layers(wide_graphs().joint.graph)))[0]

    _, layers = costs(Disturbing({name: float("inf")}), wide_graphs(), evaluation, tmp_path)

    (hit,) = (layer for layer in layers if name in layer.weights)
    assert hit.loss is not None
    assert (hit.loss.loss_points, hit.loss.relative_error) == (None, None)
    assert hit.loss.spared_loss_points is not None
    for layer in layers:
        assert layer.loss is not None
        assert layer is hit or layer.loss.spared_loss_points is None


def test_of_tasks_that_lose_the_same_one_over_budget_is_told(
    wide_graphs: MakeGraphs, wide_references: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where points are whole rows, sparing a layer often gives none back; the task it is spared for is told then."""
    probe = probe_evaluation(wide_references)
    judged = Evaluation("calibration data", probe.x, probe.tasks, budget_points=0.5, calibration=probe.x)
    found = repair(BlockWeights(8), wide_graphs().joint, replace(judged, budget_points=100.0), tmp_path)

    def losing(figures: Mapping[str, TaskAccuracy]) -> dict[str, TaskAccuracy]:
        points = {"task_0": 0.0, "task_1": 0.0, "task_2": 1.0}
        return {task: replace(each, drop_points=points[task]) for task, each in figures.items()}

    def same(
        form: Form, joint: ir.Model, kept: frozenset[str], evaluation: Evaluation, scratch: Path
    ) -> Trial:
        return Trial((), losing(found.before), ())

    monkeypatch.setattr(module, "try_form", same)
    layers = layer_costs(replace(found, before=losing(found.before)), wide_graphs(), judged, tmp_path)

    assert {layer.loss.task for layer in layers if layer.tasks is None and layer.loss} == {"task_2"}


@pytest.mark.parametrize(
    ("rows", "weight_bytes", "trials"),
    [
        (320, 14_000_000, 12),
        (0, 0, 12),
        (4096, 1, 4),
        (16_384, 1, 1),
        (16_385, 1, 0),
        (1, 2**30, 2),
        (1, 2**32, 0),
    ],
)
def test_the_bound_counts_rows_and_bytes_and_not_seconds(rows: int, weight_bytes: int, trials: int) -> None:
    assert most_trials(rows, weight_bytes) == trials

"""--prune-experts from checkpoint to bundle: a model whose gates were set so that two experts are hardly used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import te_export
import te_runtime
from te_export.bundle.staged_graphs import StagedGraphs
from te_export.bundle.weights_file import plan_weights
from te_export.capture.opset import newest_opset
from te_export.capture.torch_capture import capture
from te_export.cli import command
from te_export.errors import ParityError, UsageError
from te_export.models.exportable import ExportableModel
from te_export.models.input_rows import InputRows
from te_export.options import ExportOptions, ExportResult, OptimizeLevel, TargetProvider
from te_export.partition import partition
from te_export.precision.accuracy import evaluate_oracle
from te_export.precision.evaluation import Evaluation
from te_export.pruning.prune_tasks import prune_tasks
from te_export.report.machine import result_object
from te_export.report.terminal import result_lines
from te_export.rewrite.rewrite import rewrite, rewrite_cut
from te_export.rewrite.stack import stack_of
from te_export.verify.graph_runs import run_graph
from te_export.verify.parity import verify_pruned
from te_export.verify.probe_rows import make_probe_rows
from te_export.verify.references import evaluate_references
from te_runtime.manifest import PrunedGraph, parse_manifest

COUNT, INPUTS = 6, 20
HARDLY_USED = {"task_0": (1, 4), "task_1": (0, 5), "task_2": (1, 4)}
FAR = 14.0
"""Off a gate's bias: with logits of size 1, softmax leaves e^-14 or about 1e-6 of a share."""


def unused_experts(make_model: Callable[..., Any], **changes: object) -> Any:
    """A model whose tasks hardly use two experts each, and use the others alike."""
    model = make_model(seed=11, num_experts=COUNT, **changes)
    with torch.no_grad():
        for gating, experts in zip(model.gating_networks, HARDLY_USED.values(), strict=True):
            gating.gate[2].weight *= 0.1
            gating.gate[2].bias.zero_()
            for expert in experts:
                gating.gate[2].bias[expert] = -FAR
            used = [expert for expert in range(COUNT) if expert not in experts]
            gating.gate[2].bias[used] = 0.0
    return model


@pytest.fixture(scope="module")
def files(make_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.pt and rows.npz."""
    folder = tmp_path_factory.mktemp("pruning")
    torch.save(unused_experts(make_model).state_dict(), folder / "model.pt")
    x = np.random.default_rng(5).standard_normal((200, INPUTS)).astype(np.float32)
    np.savez(folder / "rows.npz", x=x)
    return folder


def options(files: Path, **changes: Any) -> ExportOptions:
    return ExportOptions(**{"calibration_data": files / "rows.npz", "prune_experts": 2.0, **changes})


@pytest.fixture(scope="module")
def exported(files: Path) -> ExportResult:
    return te_export.export(files / "model.pt", files / "bundle", options(files))


def pruned_of(result: ExportResult, task: str) -> PrunedGraph:
    (found,) = (own.pruned for own in result.manifest.variants[0].tasks if own.task == task)
    assert found is not None
    return found


def test_the_experts_that_are_hardly_used_are_gone(exported: ExportResult) -> None:
    for told in exported.pruning:
        hardly = set(HARDLY_USED[told.task])
        assert hardly <= set(told.removed)
        assert len(told.removed) < COUNT
        assert told.loss_points is not None
        assert told.loss_points <= told.budget_points == 2.0
        assert max(told.use.largest[expert] for expert in hardly) < 0.01
        assert all(told.use.largest[expert] < 1 / COUNT for expert in told.removed)
        assert [ratio.batch for ratio in told.latencies] == [1, 8, 64]
        entry = pruned_of(exported, told.task)
        assert entry.experts == told.removed == tuple(sorted(told.removed))
        assert entry.largest_weights == tuple(told.use.largest[expert] for expert in told.removed)
        assert entry.accuracy.loss_points == told.loss_points
        assert (entry.accuracy.task, entry.accuracy.source) == (told.task, "calibration data")


def test_the_bundle_answers_by_them(exported: ExportResult, files: Path) -> None:
    x = np.load(files / "rows.npz")["x"]
    found = {}
    for mode in ("task", "pruned"):
        with te_runtime.load(exported.bundle, mode=mode) as model:
            found[mode] = model.predict(x)
            assert model.verify().ok
    for task, whole in found["task"].items():
        pruned = found["pruned"][task]
        assert pruned.routing_weights.shape == (len(x), COUNT)
        assert (pruned.output != whole.output).any()
        lost = 100 * np.mean(pruned.output.argmax(axis=1) != whole.output.argmax(axis=1))
        assert (
            lost <= 3.0
        )  # 2 on the judged half, which one row of 200 in the other half may exceed by little


def test_verify_runs_the_pruned_graphs(exported: ExportResult) -> None:
    with te_runtime.load(exported.bundle) as model:
        report = model.verify()
    assert {f"fp32/pruned-{task}.onnx" for task in HARDLY_USED} <= set(report.graph_files)


def test_the_trunk_is_not_stored_again(exported: ExportResult) -> None:
    """What a pruned graph has alone: its gate's first layer, that layer's bias, and the means."""
    for told in exported.pruning:
        model = onnx.load(exported.bundle / f"fp32/pruned-{told.task}.onnx", load_external_data=False)
        own = [tensor for tensor in model.graph.initializer if tensor.name.endswith(f".pruned-{told.task}")]
        kept = COUNT - len(told.removed)
        assert (8, 8 * kept) in {tuple(tensor.dims) for tensor in own}
        padding = 2 * 64
        assert told.added_bytes <= 4 * (8 * 8 * kept) + padding
        assert f"experts.{told.removed[0]}." not in str([tensor.name for tensor in model.graph.initializer])


def test_the_same_export_gives_the_same_bytes(exported: ExportResult, files: Path, tmp_path: Path) -> None:
    again = te_export.export(files / "model.pt", tmp_path / "again", options(files))
    for entry in exported.manifest.files:
        assert (again.bundle / entry.path).read_bytes() == (exported.bundle / entry.path).read_bytes()
    assert again.manifest == exported.manifest


def test_reports_show_use_loss_and_latency(exported: ExportResult) -> None:
    text = "\n".join(result_lines(exported, verbose=False))
    written = (exported.bundle / "report.md").read_text()
    for told in exported.pruning:
        experts = ", ".join(map(str, told.removed))
        for shown in (text, written):
            assert f"{told.task}: without experts {experts} of {COUNT} it loses" in shown
            assert f"{told.use.largest[told.removed[0]]:.4f}" in shown
        assert f"{told.task}: latency over its task graph, one thread: " in text
    assert "## Latency\n\nNot measured; " in written
    assert not re.search(r"latency over|\d (?:µs|ms)|\dx B=", written)
    printed = json.loads(json.dumps(result_object(exported), allow_nan=False))
    assert [told["removed"] for told in printed["pruning"]] == [
        list(told.removed) for told in exported.pruning
    ]
    assert printed["pruning"][0]["latencies"][0]["batch"] == 1
    assert len(printed["pruning"][0]["use"]["largest"]) == COUNT


def test_the_command_line(exported: ExportResult, files: Path, tmp_path: Path) -> None:
    arguments = ["--prune-experts", "2", "--calibration-data", str(files / "rows.npz"), "--json", "-q"]
    outcome = command.main(
        args=[str(files / "model.pt"), "-o", str(tmp_path / "b"), *arguments], standalone_mode=False
    )
    found = json.loads(outcome.text)
    assert [told["removed"] for told in found["pruning"]] == [list(told.removed) for told in exported.pruning]
    assert {"prune"} <= set(found["step_seconds"])


@pytest.mark.parametrize(("level", "provider"), [("none", "cpu"), ("exact", "cuda")])
def test_other_shapes_of_graphs(
    files: Path, tmp_path: Path, level: OptimizeLevel, provider: TargetProvider
) -> None:
    result = te_export.export(
        files / "model.pt", tmp_path / "b", options(files, optimize=level, provider=provider, standalone=True)
    )
    for told in result.pruning:
        assert set(HARDLY_USED[told.task]) <= set(told.removed)
        assert told.added_bytes <= 4 * 8 * 8 * COUNT + 2 * 64
    with te_runtime.load(result.bundle, mode="pruned") as model:
        assert model.verify().ok


def test_nothing_goes_where_every_expert_is_used(
    make_model: Callable[..., Any], files: Path, tmp_path: Path
) -> None:
    model = make_model(seed=11, num_experts=2)
    with torch.no_grad():
        for gating in model.gating_networks:
            gating.gate[2].weight.zero_()  # each expert has half of the weight, which is not under 1/2
            gating.gate[2].bias.zero_()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    result = te_export.export(tmp_path / "model.pt", tmp_path / "b", options(files))
    for told in result.pruning:
        assert told.removed == ()
        assert told.reason == "every expert is used: the least has weight up to 0.50"
        assert told.reason in "\n".join(result_lines(result, verbose=False))
        assert told.reason in (result.bundle / "report.md").read_text()
    assert not any(entry.path.startswith("fp32/pruned") for entry in result.manifest.files)
    with pytest.raises(
        te_runtime.InputError, match=r"variant fp32 has no pruned graph: export with --prune-experts"
    ):
        te_runtime.load(result.bundle, mode="pruned")


def evaluation_of(model: ExportableModel, files: Path) -> Evaluation:
    x = InputRows({"x": np.load(files / "rows.npz")["x"]})
    return Evaluation(
        source="calibration data",
        x=x[1::2],
        tasks=evaluate_oracle(model, x[1::2]),
        budget_points=50.0,
        calibration=x[0::2],
    )


def test_a_budget_that_nothing_fits_leaves_every_expert(
    make_model: Callable[..., Any], load: Callable[..., ExportableModel], files: Path, tmp_path: Path
) -> None:
    """A budget of 0 and one output: any other number is a loss."""
    model = load(unused_experts(make_model).state_dict())
    captured = capture(model, newest_opset())
    told, found = prune_tasks(
        captured,
        partition(captured),
        evaluation_of(model, files),
        probe_rows=make_probe_rows(model).x,
        options=options(files, prune_experts=0.0, optimize="none"),
        scratch=tmp_path,
    )
    by_name = {one.task: one for one in told}
    assert by_name["task_1"].removed == ()
    assert by_name["task_1"].reason.endswith(
        "have little weight, but without any one of them the task loses more than the 0 points allowed"
    )
    assert "task_1" not in found
    assert list(tmp_path.iterdir()) != []  # the joint graph was tried there; each task's own trials are gone
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]


def test_stacks_are_runs_of_neighbours_and_lie_in_the_joint_graphs_stack(
    make_model: Callable[..., Any], load: Callable[..., ExportableModel], files: Path, tmp_path: Path
) -> None:
    model = load(unused_experts(make_model, backbone_dim=64, expert_dim=32).state_dict())
    captured = capture(model, newest_opset())
    rewritten = rewrite(captured, provider="cpu", level="exact")
    graphs, _ = rewrite_cut(
        partition(rewritten.graph), captured, rewritten.log, provider="cpu", level="exact"
    )
    _, found = prune_tasks(
        captured,
        graphs,
        evaluation_of(model, files),
        probe_rows=make_probe_rows(model).x,
        options=options(files),
        scratch=tmp_path,
    )
    others = [one.graph for one in graphs.models]
    for task, pruned in found.items():
        layout = plan_weights([*others, pruned.graph.model.graph])
        before = plan_weights(others)
        stacks = {
            name: stack
            for name, value in pruned.graph.model.graph.initializers.items()
            if (stack := stack_of(value.const_value)) is not None and name in layout.places
        }
        assert stacks, task
        for name, stack in stacks.items():
            offset, length = layout.places[name]
            assert offset + length <= before.size_bytes
            if stack.parts[0].name in before.places:  # a smaller part lies there without a place of its own
                assert offset == before.places[stack.parts[0].name][0]
        new = {tensor.name for _, tensor in layout.written} - {tensor.name for _, tensor in before.written}
        assert all(name is not None and name.endswith(f".pruned-{task}") for name in new)
        assert not any(str(name).startswith("experts.") for name in new)


def test_labels_that_cannot_judge_are_told(exported: ExportResult, files: Path, tmp_path: Path) -> None:
    """Labels that are never what the model says: whatever goes, nothing is lost on them."""
    x = np.load(files / "rows.npz")["x"]
    with te_runtime.load(exported.bundle, mode="task") as model:
        wrong = (model.predict(x)["task_0"].output.argmax(axis=1) + 1) % 4
    np.savez(tmp_path / "rows.npz", x=x, **{"labels.task_0": wrong})
    result = te_export.export(files / "model.pt", tmp_path / "b", options(tmp_path))
    assert pruned_of(result, "task_0").accuracy.metric == "accuracy"
    notes = [note for note in result.notes if note.startswith("labels.task_0 cannot judge pruning: accuracy")]
    assert len(notes) == 1
    assert notes[0] in (result.bundle / "report.md").read_text()


def test_a_pruned_graph_that_is_not_what_was_judged_is_refused(
    exported: ExportResult, references_of: Any, files: Path
) -> None:
    staged, references = references_of(exported, files)
    for task in HARDLY_USED:
        run = run_graph(staged.root, staged.pruned[task], references.rows.x)
        assert set(verify_pruned(staged, references, {task: run})) == {task}
        moved = {name: values + np.float32(0.001) for name, values in run.outputs.items()}
        with pytest.raises(ParityError, match=r"checks of pruned graphs failed.*without --prune-experts"):
            verify_pruned(staged, references, {task: replace(run, outputs=moved)})


@pytest.fixture
def references_of(load: Callable[..., ExportableModel]) -> Any:
    """`references_of(result, files)`: the bundle as staged, and what its graphs are compared with."""

    def made(result: ExportResult, files: Path) -> Any:
        (variant,) = result.manifest.variants
        staged = StagedGraphs(
            root=result.bundle,
            joint=variant.joint,
            trunk=variant.trunk,
            joint_tails=variant.joint_tails,
            tasks=variant.tasks,
            task_size_bytes={},
            pruned={own.task: own.pruned.graph for own in variant.tasks if own.pruned is not None},
        )
        model = load(torch.load(files / "model.pt"))
        return staged, evaluate_references(model, make_probe_rows(model))

    return made


def test_without_data_the_message_names_the_fix() -> None:
    with pytest.raises(UsageError, match=r"Add --calibration-data F\.npz, or leave --prune-experts out"):
        ExportOptions(prune_experts=0.5)


@pytest.mark.parametrize("points", [-1, 101, float("nan"), float("inf"), "1"])
def test_a_budget_that_is_none_is_refused(points: Any) -> None:
    with pytest.raises(UsageError, match=r"prune_experts: got .*, expected percentage points from 0 to 100"):
        ExportOptions(prune_experts=points, calibration_data=Path("rows.npz"))


def test_data_is_still_refused_where_nothing_uses_it() -> None:
    with pytest.raises(
        UsageError, match=r"neither is asked for\. Add --precision fp32,int8 or --prune-experts"
    ):
        ExportOptions(calibration_data=Path("rows.npz"))


def test_lower_precisions_and_pruning_keep_their_own_budgets(files: Path, tmp_path: Path) -> None:
    result = te_export.export(
        files / "model.pt", tmp_path / "b", options(files, precisions=("fp16",), max_accuracy_drop=7.0)
    )
    manifest = parse_manifest((result.bundle / "manifest.json").read_bytes(), "manifest.json")
    fp32, *others = manifest.variants
    budgets = {own.pruned.accuracy.budget_points for own in fp32.tasks if own.pruned is not None}
    assert budgets == {2.0}
    assert all(own.pruned is None for variant in others for own in variant.tasks)
    assert all(entry.budget_points == 7.0 for variant in others for entry in variant.accuracy)

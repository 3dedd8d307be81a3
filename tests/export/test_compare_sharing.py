"""scripts/compare_sharing.py: equal budgets, rows held out, sharing that shares, all of it in a few steps."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sharing_models
import torch
from click.testing import CliRunner
from compare_sharing import BUDGET, main
from scipy import stats
from sharing_data import NHEFS_TARGETS, Split, Table, Task, load_table, split_table
from sharing_heatmap import draw_routing
from sharing_latency import TE_EXPORT_GRAPH, check_answers, measure_latencies
from sharing_models import Family, SharingModel, Size, count_parameters, find_size, make_model
from sharing_results import Comparison, Run, resampled_t_interval
from sharing_training import TrainingOptions, draw_batches, run_family

MIXED_TASKS = (Task("weight", None), Task("pressure", None), Task("death", 2), Task("quit", 2))
TWO_TASKS = (Task("value", None), Task("kind", 3))
NEEDS_EXTRA = "needs the comparison's own packages: pip install '.[compare]', as scripts/compare_sharing does"


def small_model(family: Family, tasks: tuple[Task, ...] = TWO_TASKS) -> SharingModel:
    torch.manual_seed(0)
    return make_model(family, input_dim=5, tasks=tasks, backbone_dim=32, expert_dim=16).eval()


def small_split(seed: int = 0) -> Split:
    return split_table(small_table(), seed)


def small_table(rows: int = 80) -> Table:
    """A gap in the first column, and targets that the inputs tell."""
    inputs = np.random.default_rng(0).standard_normal((rows, 5))
    value, kind = inputs[:, 1] * 3 + 7, np.digitize(inputs[:, 2], (-0.5, 0.5))
    inputs[3, 0] = np.nan
    is_scaled = np.array([True, True, True, True, False])
    return Table("small", inputs, is_scaled, TWO_TASKS, {"value": value, "kind": kind})


def test_every_family_has_the_budget() -> None:
    sizes = [find_size(family, input_dim=88, tasks=MIXED_TASKS, budget=BUDGET) for family in Family]

    counts = [size.parameters for size in sizes]
    assert max(counts) / min(counts) <= 1.02
    for size in sizes:
        model = make_model(
            size.family,
            input_dim=88,
            tasks=MIXED_TASKS,
            backbone_dim=size.backbone_dim,
            expert_dim=size.expert_dim,
        )
        assert size.parameters + size.unused_parameters == sum(p.numel() for p in model.parameters())
        assert 1.75 <= size.backbone_dim / size.expert_dim <= 2.25


def test_a_budget_that_no_widths_meet_is_refused() -> None:
    with pytest.raises(ValueError, match="no single-task model has 10 parameters"):
        find_size(Family.SINGLE, input_dim=5, tasks=TWO_TASKS, budget=10)


@pytest.mark.parametrize("family", list(Family))
def test_what_counts_is_what_predictions_depend_on(family: Family) -> None:
    model = small_model(family)
    torch.autograd.backward(sum(prediction.square().sum() for prediction in model(torch.ones(6, 5))))

    reached = sum(p.numel() for p in model.parameters() if p.grad is not None)
    assert count_parameters(model)[0] == reached


@pytest.mark.parametrize(
    ("family", "is_shared"),
    [(Family.SINGLE, False), (Family.HARD, True), (Family.STITCH, True), (Family.TASK_EXPERT, True)],
)
def test_which_families_share_a_backbone(family: Family, is_shared: bool) -> None:
    """A parameter is shared when both tasks' predictions have a gradient for it."""
    model = small_model(family)
    backbone = [p for name, p in model.named_parameters() if "backbone" in name and name.endswith("weight")]
    reached = []
    for prediction in model(torch.randn(6, 5)):
        gradients = torch.autograd.grad(prediction.sum(), backbone, retain_graph=True, allow_unused=True)
        reached.append([gradient is not None and bool(gradient.any()) for gradient in gradients])

    assert any(first and second for first, second in zip(*reached, strict=True)) is is_shared


def test_cross_stitch_without_mixing_is_towers_apart() -> None:
    model = small_model(Family.STITCH)
    x = torch.randn(6, 5)
    mixed = model(x)
    with torch.no_grad():
        for alpha in (model.after_backbones, model.after_experts):
            alpha.copy_(torch.eye(2))

    for task, prediction in enumerate(model(x)):
        alone = model.heads[task](model.experts[task](model.backbones[task](x)))
        torch.testing.assert_close(prediction, alone)
        assert not torch.allclose(prediction, mixed[task], atol=1e-4)


def test_each_single_task_model_is_clipped_by_itself() -> None:
    assert [len(small_model(family).networks()) for family in Family] == [2, 1, 1, 1]


def test_a_split_covers_the_table_once() -> None:
    split = small_split()

    numbers = np.concatenate([split.training.numbers, split.held_out.numbers])
    assert sorted(numbers) == list(range(80))
    assert len(split.held_out.numbers) == 20
    assert set(small_split(seed=1).held_out.numbers) != set(split.held_out.numbers)


def test_training_rows_know_nothing_of_held_out_rows() -> None:
    """Medians, means and deviations stay what they were when held-out rows are changed."""
    table, before = small_table(), small_split()
    held_out = before.held_out.numbers
    table.inputs[held_out] = 1e6
    table.targets["value"][held_out] = -1e6

    after = split_table(table, 0)

    torch.testing.assert_close(after.training.x, before.training.x, rtol=0, atol=0)
    torch.testing.assert_close(after.training.targets, before.training.targets, rtol=0, atol=0)
    assert not torch.equal(after.held_out.x, before.held_out.x)


def test_only_training_rows_change_weights() -> None:
    split = small_split()
    ruined = dataclasses.replace(split, held_out=dataclasses.replace(split.held_out, x=split.held_out.x * 0))
    size = Size(Family.TASK_EXPERT, 8, 4, 0, 0)
    options = TrainingOptions(judged_after=(3,), batch_rows=16)

    (run, model), (other_run, other) = (
        run_family(size, each, TWO_TASKS, options=options, seed=0) for each in (split, ruined)
    )

    assert run.scores != other_run.scores
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_judging_on_the_way_changes_nothing() -> None:
    size = Size(Family.TASK_EXPERT, 8, 4, 0, 0)
    runs = [
        run_family(
            size, small_split(), TWO_TASKS, options=TrainingOptions(judged_after=after, batch_rows=16), seed=0
        )[0]
        for after in ((3, 6), (6,))
    ]

    assert runs[0].scores[6] == runs[1].scores[6]
    assert runs[0].scores[3] != runs[0].scores[6]


def test_a_pass_draws_every_row_at_most_once() -> None:
    batches = draw_batches(10, 3, seed=0)
    first, second = (torch.cat([next(batches) for _ in range(3)]).tolist() for _ in range(2))

    assert len(set(first)) == len(set(second)) == 9
    assert first != second


def test_training_learns_what_the_inputs_tell() -> None:
    size = Size(Family.SINGLE, 32, 16, 0, 0)
    options = TrainingOptions(judged_after=(150,), learning_rate=5e-3)
    run, _ = run_family(size, split_table(small_table(600), 0), TWO_TASKS, options=options, seed=0)

    assert run.scores[150]["value"] > 0.5  # R², 0 for the mean
    assert run.scores[150]["kind"] > 0.6  # accuracy; chance is about 0.4


def test_the_interval_allows_for_splits_that_share_rows() -> None:
    differences = [0.01, 0.03, -0.01, 0.02, 0.00]
    found = resampled_t_interval(differences, held_out_share=0.25)

    plain = stats.sem(differences) * stats.t.ppf(0.975, 4)
    assert found.mean == pytest.approx(0.01)
    # (1/5 + 1/3) / (1/5), since a quarter held out is a third of the rest.
    assert found.half_width == pytest.approx(plain * math.sqrt(1 + 5 / 3))
    assert not found.excludes_zero
    assert not resampled_t_interval([0.1], held_out_share=0.25).excludes_zero


def test_graphs_answer_as_their_models_and_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing_models, "EXPERTS", 1)  # torch's export is slow
    models = {Family.TASK_EXPERT: small_model(Family.TASK_EXPERT, (Task("value", None),))}
    found = measure_latencies(models, torch.randn(64, 5), seconds=0.02)

    assert [(each.graph, each.batch) for each in found] == [
        (graph, batch) for batch in (1, 64) for graph in ("TaskExpert", TE_EXPORT_GRAPH)
    ]
    assert all(0 < each.p10_us <= each.median_us <= each.p90_us for each in found)


class Answers:
    """As an onnxruntime session: always the same predictions."""

    def __init__(self, predictions: list[np.ndarray]) -> None:
        self.predictions = predictions

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="x")]

    def run(self, _names: list[str] | None, _feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self.predictions


def test_a_graph_that_answers_otherwise_is_not_timed() -> None:
    models = {Family.HARD: small_model(Family.HARD)}
    x = torch.randn(64, 5)
    right = [prediction.detach().numpy() for prediction in models[Family.HARD](x)]
    check_answers(Family.HARD, Answers(right), models, x)

    for wrong in (right[1] + 0.01, right[1] * np.nan):
        with pytest.raises(ArithmeticError, match="the graph of hard sharing"):
            check_answers(Family.HARD, Answers([right[0], wrong]), models, x)


def test_quick_run_prints_tables_and_keeps_every_number(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--quick", "--data", "digits", "--json", str(tmp_path / "found.json")])

    assert done.exit_code == 0, done.output
    for family in Family:
        assert f"| {family} " in done.output
    assert "heaviest_quadrant (accuracy)" in done.output
    found = json.loads((tmp_path / "found.json").read_text())
    (table,) = found["tables"]
    assert [run["family"] for run in table["runs"]] == list(Family)
    counts = [size["parameters"] for size in table["sizes"]]
    assert max(counts) / min(counts) <= 1.02
    (routing,) = (run["routing"] for run in table["runs"] if run["routing"] is not None)
    np.testing.assert_allclose(np.sum(routing, axis=1), 1, rtol=1e-5)
    assert found["settings"]["training"]["judged_after"] == [10, 20]


def test_a_folder_that_is_not_there_is_told_before_anything_runs(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--quick", "--json", str(tmp_path / "missing/found.json")])

    assert done.exit_code == 2
    assert "no such folder" in done.output


def test_the_figure_is_a_small_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason=NEEDS_EXTRA)
    measures = {"value": "R²", "kind": "accuracy"}
    run = Run(Family.TASK_EXPERT, 0, {}, 1.0, routing=[[0.2, 0.8], [0.5, 0.5]])
    found = Comparison("small", 5, 60, 20, measures, [], [run], [], [])

    draw_routing([found, found], tmp_path / "routing.png")

    written = (tmp_path / "routing.png").read_bytes()
    assert written.startswith(b"\x89PNG")
    assert len(written) < 120_000


def test_nhefs_is_read_from_the_installed_package() -> None:
    pytest.importorskip("pandas", reason=NEEDS_EXTRA)
    pytest.importorskip("causaldata", reason=NEEDS_EXTRA)
    table = load_table("nhefs")

    assert len(table.inputs) > 1500
    assert [task.measure for task in table.tasks] == ["R²", "R²", "accuracy", "accuracy"]
    assert all(not np.isnan(column).any() for column in table.targets.values())
    split = split_table(table, 0)
    assert torch.isfinite(split.training.x).all()
    assert torch.isfinite(split.held_out.x).all()
    for name in NHEFS_TARGETS:
        likeness = [abs(np.corrcoef(column, table.targets[name])[0, 1]) for column in split_columns(table)]
        assert max(likeness) < 0.95, f"an input gives {name} away"


def split_columns(table: Table) -> list[np.ndarray]:
    """The inputs that vary, gaps filled with the median."""
    filled = np.where(np.isnan(table.inputs), np.nanmedian(table.inputs, axis=0), table.inputs)
    return [column for column in filled.T if column.std() > 0]

"""The trainer minimizes the published loss, reports its parts, and saves what can be read back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel
from te_export.models.task_expert_training import (
    StepLosses,
    TaskExpertTrainer,
    balance_loss,
    diversity_loss,
    evaluate,
    new_model,
    save_checkpoint,
)

SMALL = TaskExpertConfig(
    input_dim=6,
    backbone_dim=8,
    expert_dim=6,
    num_experts=3,
    num_tasks=2,
    task_output_dims=(3, 2),
    dropout=0.0,
)
WITH_DROPOUT = TaskExpertConfig(**{**vars(SMALL), "dropout": 0.5})


def labelled_rows(count: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Rows (count, 6) float32, and per task class indices that a linear reading of the rows gives."""
    values = np.random.default_rng(seed).normal(size=(count, 6))
    largest = values[:, :3].argmax(axis=1)
    positive = (values[:, 3] > 0).astype(np.int64)
    return torch.from_numpy(values).float(), [torch.from_numpy(largest), torch.from_numpy(positive)]


def reference_losses(model: TaskExpertModel, x: Tensor, targets: list[Tensor]) -> StepLosses:
    """The loss in float64 numpy, written from MODELS.md, on predictions and routing weights from torch."""
    per_task, diversity, balance = {}, 0.0, 0.0
    for task, labels in enumerate(targets):
        with torch.no_grad():
            prediction, aux = model(x, task)
        logits, weights = prediction.numpy(), aux["gate_weights"].numpy()
        log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        per_task[task] = float(-log_softmax[np.arange(len(labels)), labels.numpy()].mean())
        diversity += float((weights * np.log(weights + 1e-8)).sum(axis=1).mean())
        mean_weights = weights.mean(axis=0)
        balance += math.sqrt(((mean_weights - mean_weights.mean()) ** 2).sum() / (len(mean_weights) - 1))
    total = sum(per_task.values()) + 0.1 * diversity + 0.05 * balance
    return StepLosses(total=total, per_task=per_task, diversity=diversity, balance=balance)


def test_a_step_reports_the_published_loss_in_float64() -> None:
    model = new_model(SMALL, seed=1).double()
    x, targets = labelled_rows(20)
    x = x.double()
    expected = reference_losses(model, x, targets)

    losses = TaskExpertTrainer(model).step([x, x], targets)

    # float64 throughout, sums of at most 60 terms of size ~1.
    assert losses.total == pytest.approx(expected.total, rel=1e-13)
    assert losses.per_task == pytest.approx(expected.per_task, rel=1e-13)
    assert losses.diversity == pytest.approx(expected.diversity, rel=1e-13)
    assert losses.balance == pytest.approx(expected.balance, rel=1e-12)  # a difference of near-equal means


def test_diversity_rewards_even_routing() -> None:
    even = torch.full((4, 8), 1 / 8, dtype=torch.float64)
    one_expert = torch.eye(8, dtype=torch.float64)[:4]

    # log(w + 1e-8) moves each by at most K · 1e-8.
    assert diversity_loss(even).item() == pytest.approx(-math.log(8), abs=1e-7)
    assert diversity_loss(one_expert).item() == pytest.approx(0.0, abs=1e-7)
    assert diversity_loss(even) < diversity_loss(one_expert)


def test_balance_is_zero_where_every_expert_gets_the_same_mean_weight() -> None:
    taking_turns = torch.eye(4, dtype=torch.float64)
    always_the_first = torch.eye(4, dtype=torch.float64)[[0, 0, 0, 0]]

    assert balance_loss(taking_turns).item() == 0.0
    assert balance_loss(always_the_first).item() == pytest.approx(0.5)  # sqrt((0.75² + 3 · 0.25²) / 3)


def test_one_expert_is_balanced_and_trains() -> None:
    config = TaskExpertConfig(**{**vars(SMALL), "num_experts": 1})
    model = new_model(config, seed=0)
    x, targets = labelled_rows(8)

    losses = TaskExpertTrainer(model).step([x, x], targets)

    assert losses.balance == 0.0
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_an_update_is_adamw_on_the_clipped_gradient() -> None:
    x, targets = labelled_rows(16)
    model, by_hand = new_model(SMALL, seed=2), new_model(SMALL, seed=2)
    TaskExpertTrainer(model, max_gradient_norm=1e-3).step([x, x], targets)

    predictions = [by_hand(x, task) for task in (0, 1)]
    loss = sum(
        torch.nn.functional.cross_entropy(p, t) for (p, _), t in zip(predictions, targets, strict=True)
    )
    for _, aux in predictions:
        weights = aux["gate_weights"]
        loss = loss + 0.1 * (weights * torch.log(weights + 1e-8)).sum(dim=1).mean()
        loss = loss + 0.05 * weights.mean(dim=0).std()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-3, weight_decay=1e-4)
    loss.backward()
    gradients = [p.grad for p in by_hand.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients]))
    assert norm > 1e-3
    for gradient in gradients:
        gradient.mul_(1e-3 / (norm + 1e-6))
    optimizer.step()

    for (name, updated), expected in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        # The first AdamW update is lr · g / (|g| + 1e-8), which magnifies float32 noise where g is tiny.
        torch.testing.assert_close(updated, expected, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(("bound", "is_clipped"), [(0.01, True), (1e6, False)])
def test_the_gradient_norm_is_clipped_at_the_bound_and_only_there(bound: float, is_clipped: bool) -> None:
    model = new_model(SMALL, seed=3)
    x, targets = labelled_rows(16)

    TaskExpertTrainer(model, max_gradient_norm=bound).step([x, x], targets)

    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.cat(gradients)).item()
    if is_clipped:
        assert norm == pytest.approx(bound, rel=1e-3)  # clip_grad_norm_ divides by norm + 1e-6
    else:
        assert 0.01 < norm < bound


def test_the_default_bound_on_the_gradient_norm_is_one() -> None:
    assert TaskExpertTrainer(new_model(SMALL, seed=0)).max_gradient_norm == 1.0


def test_learning_rate_and_weight_decay_come_from_the_config_unless_given() -> None:
    model = new_model(TaskExpertConfig(**{**vars(SMALL), "learning_rate": 0.5, "weight_decay": 0.25}), seed=0)

    from_config = TaskExpertTrainer(model).optimizer.param_groups[0]
    given = TaskExpertTrainer(model, learning_rate=0.1, weight_decay=0.0).optimizer.param_groups[0]

    assert (from_config["lr"], from_config["weight_decay"]) == (0.5, 0.25)
    assert (given["lr"], given["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize(("is_shared", "expected_runs"), [(True, 1), (False, 2)])
def test_the_trunk_runs_once_where_tasks_share_their_input(
    is_shared: bool, expected_runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(SMALL, seed=0)
    runs: list[Tensor] = []
    trunk = model.trunk
    monkeypatch.setattr(model, "trunk", lambda x: runs.append(x) or trunk(x))
    x, targets = labelled_rows(4)

    TaskExpertTrainer(model).step([x, x if is_shared else x.clone()], targets)

    assert len(runs) == expected_runs


def test_a_shared_input_gives_the_same_losses_as_equal_inputs() -> None:
    x, targets = labelled_rows(12)

    shared = TaskExpertTrainer(new_model(SMALL, seed=4)).step([x, x], targets)
    separate = TaskExpertTrainer(new_model(SMALL, seed=4)).step([x, x.clone()], targets)

    assert shared == separate


def test_a_mapping_trains_only_the_tasks_it_names() -> None:
    model = new_model(SMALL, seed=5)
    x, targets = labelled_rows(12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    losses = TaskExpertTrainer(model).step({1: x}, {1: targets[1]})

    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert list(losses.per_task) == [1]
    assert "task_heads.1.head.3.weight" in changed
    assert not any(
        name.startswith(("task_heads.0.", "gating_networks.0.", "feature_fusion.")) for name in changed
    )


def test_tasks_may_have_different_row_counts() -> None:
    few, targets = labelled_rows(3)
    many, more_targets = labelled_rows(9, seed=1)

    losses = TaskExpertTrainer(new_model(SMALL, seed=0)).step([few, many], [targets[0], more_targets[1]])

    assert list(losses.per_task) == [0, 1]


def test_accuracy_rises_on_a_problem_that_can_be_learned() -> None:
    wide_enough = TaskExpertConfig(**{**vars(SMALL), "backbone_dim": 48, "expert_dim": 16, "dropout": 0.1})
    model = new_model(wide_enough, seed=0)
    trainer = TaskExpertTrainer(model, learning_rate=1e-2)
    x, targets = labelled_rows(256)
    held_out, held_out_targets = labelled_rows(256, seed=1)
    before = evaluate(model, [held_out] * 2, held_out_targets)

    losses = [trainer.step([x, x], targets).total for _ in range(100)]
    after = evaluate(model, [held_out] * 2, held_out_targets)

    assert losses[-1] < losses[0] / 2
    assert before.mean_accuracy < 0.7
    assert after.mean_accuracy > 0.85


def test_evaluation_counts_rows_whose_arg_max_is_the_target() -> None:
    model = new_model(SMALL, seed=6).eval()
    x, _ = labelled_rows(8)
    predicted = [model(x, task)[0].argmax(dim=1) for task in (0, 1)]
    wrong_in_two_rows = predicted[1].clone()
    wrong_in_two_rows[:2] = 1 - wrong_in_two_rows[:2]

    evaluation = evaluate(model, [x, x], [predicted[0], wrong_in_two_rows])

    assert evaluation.accuracy == {0: 1.0, 1: 0.75}
    assert evaluation.mean_accuracy == 0.875


def test_evaluation_runs_without_dropout_and_restores_every_mode() -> None:
    model = new_model(WITH_DROPOUT, seed=7).train()
    model.backbone.eval()
    x, targets = labelled_rows(64)

    first, second = (evaluate(model, [x, x], targets) for _ in range(2))

    assert first == second
    assert model.training
    assert model.experts.training
    assert not model.backbone.training
    assert not model.backbone.network.training


def test_evaluation_restores_the_mode_after_a_failure() -> None:
    model = new_model(SMALL, seed=0).train()

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        evaluate(model, [torch.zeros(2, 5)] * 2, [torch.zeros(2, dtype=torch.int64)] * 2)

    assert model.training


def test_training_is_repeatable_from_its_seeds_and_leaves_the_global_seed_alone() -> None:
    x, targets = labelled_rows(32)

    def train(seed: int) -> list[StepLosses]:
        trainer = TaskExpertTrainer(new_model(WITH_DROPOUT, seed=0), seed=seed)
        return [trainer.step([x, x], targets) for _ in range(3)]

    before = torch.get_rng_state()
    first = train(seed=1)
    torch.rand(5)
    assert train(seed=1) == first
    assert train(seed=2) != first

    torch.set_rng_state(before)
    train(seed=1)
    assert torch.equal(torch.get_rng_state(), before)


ROWS = torch.zeros(2, 6)
LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ([ROWS], [LABELS, LABELS], r"inputs are of tasks \[0\], targets of tasks \[0, 1\]"),
        ({2: ROWS}, {2: LABELS}, r"tasks \[2\] given, the model has tasks 0 to 1"),
        ([], [], "tasks none given"),
        ([ROWS, ROWS], [LABELS, LABELS[:1]], "task 1 has 2 input rows and 1 targets"),
        ([ROWS[:0]], [LABELS[:0]], "task 0 has 0 input rows and 0 targets"),
    ],
)
def test_inputs_that_do_not_fit_their_targets_are_refused(inputs: Any, targets: Any, message: str) -> None:
    model = new_model(SMALL, seed=0)

    with pytest.raises(ValueError, match=message):
        TaskExpertTrainer(model).step(inputs, targets)
    with pytest.raises(ValueError, match=message):
        evaluate(model, inputs, targets)


def test_a_loss_that_is_not_finite_stops_training_before_a_weight_changes() -> None:
    model = new_model(SMALL, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, targets = labelled_rows(4)
    x[0, 0] = float("nan")

    with pytest.raises(FloatingPointError, match="loss of step 0 is nan"):
        TaskExpertTrainer(model).step([x, x], targets)

    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def saved(path: Path) -> tuple[TaskExpertModel, TaskExpertTrainer]:
    model = new_model(SMALL, seed=8)
    trainer = TaskExpertTrainer(model)
    x, targets = labelled_rows(8)
    trainer.step([x, x], targets)
    save_checkpoint(path, model, epoch=3, optimizer=trainer.optimizer, task_names=["largest", "sign"])
    return model, trainer


def test_a_checkpoint_holds_plain_values_and_reads_back(tmp_path: Path) -> None:
    model, trainer = saved(tmp_path / "model.pt")

    found = torch.load(tmp_path / "model.pt", weights_only=True)

    assert list(found) == ["state_dict", "config", "task_names", "epoch", "optimizer_state_dict"]
    assert found["config"] == {**vars(SMALL), "task_output_dims": [3, 2]}
    assert type(found["config"]["task_output_dims"]) is list
    assert found["task_names"] == ["largest", "sign"]
    assert found["epoch"] == 3
    read = TaskExpertModel(TaskExpertConfig(**found["config"]))
    read.load_state_dict(found["state_dict"])
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True))
    resumed = TaskExpertTrainer(read)
    resumed.optimizer.load_state_dict(found["optimizer_state_dict"])
    assert resumed.optimizer.state_dict()["param_groups"] == trainer.optimizer.state_dict()["param_groups"]


def test_the_same_training_saves_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    saved(tmp_path / "one.pt")
    saved(tmp_path / "two.pt")

    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"earlier")

    def full_disk(contents: object, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        saved(path)

    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_needs_a_name_for_every_task(tmp_path: Path) -> None:
    model = new_model(SMALL, seed=0)
    optimizer = TaskExpertTrainer(model).optimizer

    with pytest.raises(ValueError, match="1 task names, the model has 2 tasks"):
        save_checkpoint(tmp_path / "model.pt", model, epoch=0, optimizer=optimizer, task_names=["only"])

    assert list(tmp_path.iterdir()) == []

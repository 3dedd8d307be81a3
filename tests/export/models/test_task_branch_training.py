"""Two phases: W learns to rebuild its inputs, then branches and β are fitted, each at its own rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from te_export.models.task_branch import TaskBranchConfig, TaskBranchModel
from te_export.models.task_branch_training import (
    FineTuning,
    evaluate,
    fine_tune,
    new_model,
    pretrain,
    reconstruction_loss,
    save_checkpoint,
)

SMALL = TaskBranchConfig(
    input_dim=6,
    shared_dim=8,
    branch_dim=8,
    output_dim=1,
    task_names=("sum", "product"),
    learning_rate=1e-2,
    weight_decay=0.0,
)


def data(count: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows (count, 6) of three hidden causes, and targets (count, 1) that depend on them."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(count, 3))
    mixing = np.random.default_rng(99).normal(size=(3, 6))
    x = 5 + 3 * (causes @ mixing) + 0.1 * rng.normal(size=(count, 6))
    added, multiplied = causes[:, 0] + causes[:, 1], causes[:, 0] * causes[:, 2]
    targets = {"sum": added, "product": multiplied, "aggregate": 0.8 * added + 0.2 * multiplied}
    return torch.from_numpy(x).float(), {
        name: torch.from_numpy(value[:, None]).float() for name, value in targets.items()
    }


def copy_of(model: TaskBranchModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed_parts(model: TaskBranchModel, before: dict[str, Tensor]) -> set[str]:
    after = model.state_dict()
    return {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_the_reconstruction_is_by_the_same_matrix_transposed() -> None:
    model = new_model(SMALL, seed=1).double()
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 6)))
    c = torch.linspace(-1, 1, 6).double()

    loss = reconstruction_loss(model, z, c)

    w, b = (model.shared.weight.detach().numpy(), model.shared.bias.detach().numpy())
    rebuilt = np.tanh(z.numpy() @ w.T + b) @ w + c.numpy()
    assert loss.item() == pytest.approx(((z.numpy() - rebuilt) ** 2).mean(), rel=1e-13)


def test_pretraining_standardizes_lowers_the_loss_and_touches_no_branch() -> None:
    x, _ = data(200)
    model = new_model(SMALL, seed=0)
    before = copy_of(model)

    means = pretrain(model, x, epochs=40, batch_rows=32, seed=0)

    assert means[-1] < means[0] / 5
    assert changed_parts(model, before) == {"standardize", "shared"}
    z = model.standardize(x)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std(dim=0, correction=0), torch.ones(6), rtol=1e-5, atol=0)


def test_a_step_reports_the_squared_error_of_every_output_in_float64() -> None:
    model = new_model(SMALL, seed=2).double()
    x, targets = data(30)
    x, targets = x.double(), {name: target.double() for name, target in targets.items()}
    with torch.no_grad():
        outputs = {name: value.numpy() for name, value in model(x).items()}
    expected = {name: ((outputs[name] - target.numpy()) ** 2).mean() for name, target in targets.items()}

    losses = FineTuning(model).step(x, targets)

    assert losses.per_output == pytest.approx(expected, rel=1e-13)
    assert losses.total == pytest.approx(sum(expected.values()), rel=1e-13)


def test_training_both_phases_learns_every_output_and_weighs_the_branches() -> None:
    x, targets = data(400)
    held_out, held_out_targets = data(200, seed=1)
    model = new_model(SMALL, seed=0)
    pretrain(model, x, epochs=20, batch_rows=32, seed=0)

    means = fine_tune(FineTuning(model), x, targets, epochs=30, batch_rows=32, seed=0)

    r2 = evaluate(model, held_out, held_out_targets)
    assert means[-1] < means[0] / 3
    assert min(r2.values()) > 0.6
    beta = torch.softmax(model.task_weights.logits.detach(), dim=0)
    assert beta[0] > 0.6  # 0.8 of the aggregate is the first task


def test_fine_tuning_leaves_w_as_it_is_unless_told_otherwise() -> None:
    x, targets = data(16)

    for factor, expected in ((0.0, False), (0.1, True)):
        model = new_model(SMALL, seed=0)
        before = copy_of(model)
        FineTuning(model, shared_factor=factor).step(x, targets)
        parts = changed_parts(model, before)
        assert ("shared" in parts) is expected
        assert {"branches.0.0", "branches.1.2", "task_weights"} <= parts
        assert "standardize" not in parts


def test_every_branch_has_its_own_learning_rate() -> None:
    x, targets = data(16)
    model = new_model(SMALL, seed=0)
    before = copy_of(model)
    tuning = FineTuning(model, rate_factors={"sum": 0.1, "product": 2.0}, task_weights_factor=5.0)

    tuning.step(x, targets)

    def moved(part: str) -> float:
        """AdamW's first step moves every weight with a gradient by the learning rate."""
        after = model.state_dict()
        return max(float((after[n] - before[n]).abs().max()) for n in before if n.startswith(part))

    # A float32 weight below 1 is rounded to within 6e-8.
    assert moved("branches.0.") == pytest.approx(1e-3, rel=1e-3)
    assert moved("branches.1.") == pytest.approx(2e-2, rel=1e-3)
    assert moved("task_weights.") == pytest.approx(5e-2, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate_factors": {"quotient": 1.0}}, "rate_factors of quotient: the tasks are sum, product"),
        ({"rate_factors": {"sum": -1.0}}, "learning-rate factor is -1.0, expected a finite number"),
        ({"shared_factor": float("inf")}, "learning-rate factor is inf"),
        ({"task_weights_factor": float("nan")}, "learning-rate factor is nan"),
    ],
)
def test_factors_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuning(new_model(SMALL, seed=0), **settings)  # type: ignore[arg-type]


def test_targets_must_be_of_every_output_and_fit() -> None:
    model = new_model(SMALL, seed=0)
    x, targets = data(4)

    with pytest.raises(
        ValueError, match="targets of product, sum, expected one for each of sum, product, agg"
    ):
        FineTuning(model).step(x, {name: targets[name] for name in ("sum", "product")})
    with pytest.raises(ValueError, match=r"target of 'sum' is \[4\], expected \[4, 1\]"):
        evaluate(model, x, {**targets, "sum": targets["sum"][:, 0]})


def test_a_loss_that_is_not_finite_stops_training_before_a_weight_changes() -> None:
    model = new_model(SMALL, seed=0)
    x, targets = data(4)
    before = copy_of(model)
    targets["sum"][0] = float("nan")

    with pytest.raises(FloatingPointError, match="loss of step 0 is nan"):
        FineTuning(model).step(x, targets)

    assert changed_parts(model, before) == set()


def test_training_is_repeatable_and_leaves_the_global_seed_alone() -> None:
    x, targets = data(32)
    state = torch.get_rng_state()

    def train(seed: int) -> list[float]:
        model = new_model(SMALL, seed=0)
        first = pretrain(model, x, epochs=2, batch_rows=8, seed=seed)
        return first + fine_tune(FineTuning(model), x, targets, epochs=2, batch_rows=8, seed=seed)

    assert train(1) == train(1)
    assert train(1) != train(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_holds_plain_values_and_reads_back(tmp_path: Path) -> None:
    model = new_model(SMALL, seed=4)

    save_checkpoint(tmp_path / "model.pt", model, epoch=3)

    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(found) == ["state_dict", "config", "task_names", "epoch"]
    assert TaskBranchConfig(**found["config"]) == SMALL
    TaskBranchModel(SMALL).load_state_dict(found["state_dict"])

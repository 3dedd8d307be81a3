"""The loss is Σ_j P_t,j · L_j with L_j of the component's own prediction; training lowers it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from te_export.models.shared_component import SharedComponentConfig, SharedComponentModel
from te_export.models.shared_component_training import (
    SharedComponentTrainer,
    box_overlap,
    component_losses,
    evaluate,
    fit,
    new_model,
    save_checkpoint,
)

SMALL = SharedComponentConfig(
    image_shape=(1, 8, 8),
    component_kinds=("convolutional", "profile"),
    component_widths=(4, 12),
    feature_dim=16,
    gate_dim=8,
    task_names=("half", "place"),
    task_kinds=("classes", "box"),
    task_output_dims=(2, 4),
    routing_kinds=("learned", "learned"),
    learning_rate=1e-2,
)


def boxes(rows: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Bright rectangles on black, the half their left edge is in, and their box."""
    rng = np.random.default_rng(seed)
    corner, size = rng.integers(0, 5, (rows, 2)), rng.integers(2, 4, (rows, 2))
    x = np.zeros((rows, 1, 8, 8))
    for row, ((left, top), (width, height)) in enumerate(zip(corner, size, strict=True)):
        x[row, 0, top : top + height, left : left + width] = 1.0
    box = np.concatenate([corner, corner + size], axis=1) / 8
    half = (corner[:, 0] >= 3).astype(np.int64)
    return torch.from_numpy(x).float(), {
        "half": torch.from_numpy(half),
        "place": torch.from_numpy(box).float(),
    }


def own_loss(kind: str, prediction: np.ndarray, target: Any) -> float:
    """ℓ of one component's prediction (out,) for one row."""
    if kind == "classes":
        return float(np.log(np.exp(prediction).sum()) - prediction[target])
    return float(np.abs(prediction - target).sum())


def reference_losses(model: SharedComponentModel, x: Tensor, targets: dict[str, Tensor]) -> dict[str, float]:
    """The definition, row by row and component by component."""
    with torch.no_grad():
        terms = model.forward_with_terms(x)
    losses = {}
    for name, kind in zip(model.config.task_names, model.config.task_kinds, strict=True):
        weights = terms[name].routing_weights.numpy()
        predictions = terms[name].component_predictions.numpy()
        target = targets[name].numpy()
        total = 0.0
        for row in range(len(x)):
            for j in range(weights.shape[1]):
                own = predictions[row, j]
                total += weights[row, j] * own_loss(kind, own, target[row])
        losses[name] = total / len(x)
    return losses


def test_a_step_reports_the_defined_loss_in_float64() -> None:
    model = new_model(SMALL, seed=1).double()
    x, targets = boxes(12)
    targets["place"] = targets["place"].double()
    expected = reference_losses(model, x.double(), targets)

    losses = SharedComponentTrainer(model).step(x.double(), targets)

    # float64 throughout, sums of some 100 terms of size 1.
    assert losses.per_task == pytest.approx(expected, rel=1e-12)
    assert losses.total == pytest.approx(sum(expected.values()), rel=1e-12)


def test_the_loss_of_the_prediction_is_at_most_the_trained_loss() -> None:
    model = new_model(SMALL, seed=2)
    x, targets = boxes(40)

    losses = SharedComponentTrainer(model, max_gradient_norm=1e-12).step(x, targets)

    with torch.no_grad():
        predictions = new_model(SMALL, seed=2)(x)
    half = torch.nn.functional.cross_entropy(predictions["half"], targets["half"]).item()
    place = (predictions["place"] - targets["place"]).abs().sum(dim=1).mean().item()
    assert half <= losses.per_task["half"] + 1e-6
    assert place <= losses.per_task["place"] + 1e-6


@pytest.mark.parametrize("kind", ["classes", "box"])
def test_component_losses_have_a_column_per_component(kind: Any) -> None:
    predictions = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 1, 2, 3, 0]) if kind == "classes" else torch.zeros(5, 4)

    assert component_losses(kind, predictions, target).shape == (5, 3)


def test_training_lowers_the_loss_and_learns_both_tasks() -> None:
    model = new_model(SMALL, seed=0)
    x, targets = boxes(256)
    held_out, held_out_targets = boxes(128, seed=1)
    before = evaluate(model, held_out, held_out_targets)

    means = fit(SharedComponentTrainer(model), x, targets, epochs=25, batch_rows=64, seed=0)

    after = evaluate(model, held_out, held_out_targets)
    assert means[-1] < means[0] / 3
    assert after["half"] > max(0.95, before["half"])
    assert after["place"] > max(0.5, before["place"])


def test_routing_learns_at_its_own_rate_and_fixed_routing_not_at_all() -> None:
    learned = SharedComponentTrainer(new_model(SMALL, seed=0), routing_rate_factor=0.5).optimizer
    fixed = new_model(replace(SMALL, routing_kinds=("fixed", "fixed")), seed=0)

    assert [group["lr"] for group in learned.param_groups] == [1e-2, 5e-3]
    assert len(learned.param_groups[1]["params"]) == 8
    assert len(SharedComponentTrainer(fixed).optimizer.param_groups) == 1


def test_training_is_repeatable_and_leaves_the_global_seed_alone() -> None:
    x, targets = boxes(32)
    state = torch.get_rng_state()

    runs = [
        fit(SharedComponentTrainer(new_model(SMALL, seed=3)), x, targets, epochs=2, batch_rows=8, seed=s)
        for s in (5, 5, 6)
    ]

    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_tasks_that_are_named_are_trained() -> None:
    model = new_model(replace(SMALL, weight_decay=0.0), seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, targets = boxes(16)

    losses = SharedComponentTrainer(model).step(x, {"place": targets["place"]})

    assert list(losses.per_task) == ["place"]
    after = model.state_dict()
    changed = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert "heads.1" in changed
    assert not changed & {"heads.0", "routing.0.gate.0", "routing.0.gate.2"}


def test_progress_is_told_of_every_epoch() -> None:
    x, targets = boxes(8)
    told: list[tuple[int, float]] = []

    means = fit(
        SharedComponentTrainer(new_model(SMALL, seed=0)),
        x,
        targets,
        epochs=2,
        batch_rows=8,
        seed=0,
        report=lambda epoch, loss: told.append((epoch, loss)),
    )

    assert told == [(1, means[0]), (2, means[1])]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "targets of tasks none given, the model has tasks half, place"),
        ({"other": torch.zeros(4)}, r"targets of tasks \['other'\] given"),
        ({"half": torch.zeros(3, dtype=torch.int64)}, "task 'half' has 4 images and 3 targets"),
    ],
)
def test_targets_that_fit_no_task_or_row_are_refused(targets: dict[str, Tensor], message: str) -> None:
    model = new_model(SMALL, seed=0)
    x, _ = boxes(4)

    with pytest.raises(ValueError, match=message):
        SharedComponentTrainer(model).step(x, targets)
    with pytest.raises(ValueError, match=message):
        evaluate(model, x, targets)


def test_a_loss_that_is_not_finite_stops_training_before_a_weight_changes() -> None:
    model = new_model(SMALL, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, targets = boxes(4)
    x[0, 0, 0, 0] = float("nan")

    with pytest.raises(FloatingPointError, match="loss of step 0 is nan"):
        SharedComponentTrainer(model).step(x, targets)

    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_overlap_is_intersection_over_union() -> None:
    box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    others = torch.tensor(
        [[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0], [5.0, 5.0, 6.0, 6.0], [2.0, 2.0, 0.0, 0.0]]
    )

    found = box_overlap(others, box.expand(4, 4))

    torch.testing.assert_close(found, torch.tensor([1.0, 1 / 3, 0.0, 0.0]))
    assert box_overlap(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0.0


def test_a_checkpoint_holds_plain_values_and_reads_back(tmp_path: Path) -> None:
    model = new_model(SMALL, seed=4)

    save_checkpoint(tmp_path / "model.pt", model, epoch=3)

    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(found) == ["state_dict", "config", "task_names", "epoch"]
    assert SharedComponentConfig(**found["config"]) == SMALL
    assert {type(value) for value in found["config"].values()} == {list, int, float}
    assert set(found["config"]) == set(asdict(SMALL))
    read = SharedComponentModel(SharedComponentConfig(**found["config"]))
    read.load_state_dict(found["state_dict"])
    assert list(tmp_path.iterdir()) == [tmp_path / "model.pt"]

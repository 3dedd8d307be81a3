"""The task-branch model's arithmetic, against numpy in float64 written from its definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from te_export.models.task_branch import TaskBranchConfig, TaskBranchModel
from te_export.models.task_branch_training import new_model

SMALL = TaskBranchConfig(input_dim=5, shared_dim=4, branch_dim=3, output_dim=2, task_names=("a", "b", "c"))


def small_model() -> TaskBranchModel:
    """SMALL in float64, with a standardization and task weights of its own."""
    rng = np.random.default_rng(2)
    model = new_model(SMALL, seed=1).double().eval()
    with torch.no_grad():
        model.standardize.mean.copy_(torch.from_numpy(rng.normal(size=5)))
        model.standardize.scale.copy_(torch.from_numpy(rng.uniform(0.5, 2.0, size=5)))
        model.task_weights.logits.copy_(torch.tensor([0.5, -1.0, 2.0]))
    return model


def rows(count: int, width: int = 5, seed: int = 0) -> torch.Tensor:
    """(count, width) float64 normal values."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, width)))


def test_forward_is_every_branch_and_their_weighted_sum_in_float64() -> None:
    model, x = small_model(), rows(7)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    with torch.no_grad():
        found = model(x)

    z = (x.numpy() - state["standardize.mean"]) / state["standardize.scale"]
    h = np.tanh(z @ state["shared.weight"].T + state["shared.bias"])
    beta = np.exp([0.5, -1.0, 2.0]) / np.exp([0.5, -1.0, 2.0]).sum()
    aggregate = np.zeros((7, 2))
    for i, name in enumerate(("a", "b", "c")):
        hidden = np.maximum(h @ state[f"branches.{i}.0.weight"].T + state[f"branches.{i}.0.bias"], 0)
        expected = hidden @ state[f"branches.{i}.2.weight"].T + state[f"branches.{i}.2.bias"]
        # float64 sums of at most 5 terms of size 1.
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-13, atol=1e-14)
        aggregate += beta[i] * expected
    np.testing.assert_allclose(found["aggregate"].numpy(), aggregate, rtol=1e-13, atol=1e-14)
    assert list(found) == ["a", "b", "c", "aggregate"]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    logits=st.lists(st.floats(-50, 50), min_size=1, max_size=6),
    count=st.integers(1, 4),
    output_dim=st.integers(1, 3),
)
def test_task_weights_are_positive_and_sum_to_one_in_every_row(
    logits: list[float], count: int, output_dim: int
) -> None:
    names = tuple(f"t{i}" for i in range(len(logits)))
    model = new_model(replace(SMALL, output_dim=output_dim, task_names=names), seed=0).double()
    with torch.no_grad():
        model.task_weights.logits.copy_(torch.tensor(logits))
        weights = model.task_weights(torch.zeros(count, len(logits), output_dim))
        found = model(rows(count))

    assert weights.shape == (count, len(logits))
    assert bool((weights > 0).all())
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(count).double(), rtol=0, atol=1e-14)
    assert {tuple(value.shape) for value in found.values()} == {(count, output_dim)}
    between = torch.stack([found[name] for name in names])  # a weighted mean lies between its terms
    assert bool((found["aggregate"] <= between.amax(dim=0) + 1e-12).all())
    assert bool((found["aggregate"] >= between.amin(dim=0) - 1e-12).all())


def test_names_are_those_the_module_documents() -> None:
    expected = {
        "standardize.mean": [5],
        "standardize.scale": [5],
        "shared.weight": [4, 5],
        "shared.bias": [4],
        "task_weights.logits": [3],
    }
    for i in range(3):
        expected |= {f"branches.{i}.0.weight": [3, 4], f"branches.{i}.0.bias": [3]}
        expected |= {f"branches.{i}.2.weight": [2, 3], f"branches.{i}.2.bias": [2]}

    assert {name: list(tensor.shape) for name, tensor in small_model().state_dict().items()} == expected


def test_standardization_is_over_all_rows_and_leaves_constant_columns_at_scale_one() -> None:
    x = rows(50) * 7 + 3
    x[:, 2] = 0.1  # its mean over 50 rows is not 0.1 exactly
    model = new_model(SMALL, seed=0).double()

    model.standardize.set_from(x)

    z = model.standardize(x).numpy()
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-14)
    np.testing.assert_allclose(np.delete(z.std(axis=0), 2), 1, rtol=1e-13)
    assert model.standardize.scale[2].item() == 1.0


@pytest.mark.parametrize(
    "x", [torch.zeros(0, 5), torch.zeros(3, 4), torch.zeros(5), torch.full((3, 5), float("nan"))]
)
def test_rows_that_give_no_standardization_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected at least one of 5 finite values"):
        new_model(SMALL, seed=0).standardize.set_from(x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared_dim": 0}, "shared_dim is 0, expected at least 1"),
        ({"task_names": ()}, r"task_names is \[\], expected at least one name"),
        ({"task_names": ("a", "a")}, "each once"),
        ({"task_names": ("a", "Aggregate")}, "the name of the weighted sum"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)  # type: ignore[arg-type]

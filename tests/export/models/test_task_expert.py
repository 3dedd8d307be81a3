"""TaskExpert keeps the names, shapes and arithmetic that checkpoints in the wild have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel
from te_export.models.task_expert_training import new_model

SMALL = TaskExpertConfig(
    input_dim=7,
    backbone_dim=6,
    expert_dim=5,
    num_experts=3,
    num_tasks=2,
    task_output_dims=(4, 2),
    dropout=0.0,
)


def rows(count: int, config: TaskExpertConfig = SMALL, seed: int = 0) -> torch.Tensor:
    """(count, input_dim) float64 normal values."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, config.input_dim)))


def linear_shapes(prefix: str, layer: int, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{layer}.weight": (size_out, size_in), f"{prefix}.{layer}.bias": (size_out,)}


def expected_shapes(config: TaskExpertConfig) -> dict[str, tuple[int, ...]]:
    """Section 1 of MODELS.md, row by row."""
    bb, de, experts = config.backbone_dim, config.expert_dim, config.num_experts
    shapes = linear_shapes("backbone.network", 0, config.input_dim, 2 * bb)
    shapes |= linear_shapes("backbone.network", 3, 2 * bb, bb)
    shapes |= linear_shapes("backbone.network", 6, bb, bb)
    for i in range(experts):
        shapes |= linear_shapes(f"experts.{i}.network", 0, bb, 2 * de)
        shapes |= linear_shapes(f"experts.{i}.network", 3, 2 * de, de)
        shapes |= linear_shapes(f"experts.{i}.network", 6, de, de)
    for t in range(config.num_tasks):
        shapes |= linear_shapes(f"gating_networks.{t}.gate", 0, experts * de, de)
        shapes |= linear_shapes(f"gating_networks.{t}.gate", 2, de, experts)
    for t, size in enumerate(config.task_output_dims):
        shapes |= linear_shapes(f"task_heads.{t}.head", 0, de, de // 2)
        shapes |= linear_shapes(f"task_heads.{t}.head", 3, de // 2, size)
    return shapes | linear_shapes("feature_fusion", 0, experts * de, de)


@pytest.mark.parametrize("config", [SMALL, TaskExpertConfig(), TaskExpertConfig(final_relu=True)])
def test_parameter_names_order_and_shapes_are_those_of_checkpoints_in_the_wild(
    config: TaskExpertConfig,
) -> None:
    with torch.device("meta"):
        model = TaskExpertModel(config)

    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    assert list(found.items()) == list(expected_shapes(config).items())


def test_the_config_defaults_are_those_of_checkpoints_in_the_wild() -> None:
    config = TaskExpertConfig()

    assert (config.input_dim, config.backbone_dim, config.expert_dim) == (784, 512, 128)
    assert (config.num_experts, config.num_tasks, config.task_output_dims) == (8, 5, (10,) * 5)
    assert (config.dropout, config.learning_rate, config.weight_decay) == (0.1, 1e-3, 1e-4)
    assert config.final_relu is False


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0)


def reference_forward(
    state: dict[str, np.ndarray], x: np.ndarray, task: int, config: TaskExpertConfig
) -> dict[str, np.ndarray]:
    """The model in float64 numpy, written from MODELS.md alone."""

    def linear(name: str, value: np.ndarray) -> np.ndarray:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def three_layers(prefix: str, value: np.ndarray) -> np.ndarray:
        hidden = relu(linear(f"{prefix}.3", relu(linear(f"{prefix}.0", value))))
        last = linear(f"{prefix}.6", hidden)
        return relu(last) if config.final_relu else last

    h = three_layers("backbone.network", x)
    experts = [three_layers(f"experts.{i}.network", h) for i in range(config.num_experts)]
    gate, head = f"gating_networks.{task}.gate", f"task_heads.{task}.head"
    logits = linear(f"{gate}.2", relu(linear(f"{gate}.0", np.concatenate(experts, axis=1))))
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    fused = sum(weights[:, i : i + 1] * expert for i, expert in enumerate(experts))
    return {
        "prediction": linear(f"{head}.3", relu(linear(f"{head}.0", fused))),
        "backbone_features": h,
        "expert_features": np.stack(experts, axis=1),
        "gate_weights": weights,
        "task_specific_features": fused,
    }


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("task", [0, 1])
def test_forward_is_the_published_arithmetic(task: int, final_relu: bool) -> None:
    config = TaskExpertConfig(**{**vars(SMALL), "final_relu": final_relu})
    model = new_model(config, seed=1).double().eval()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    x = rows(9)

    with torch.no_grad():
        prediction, aux = model(x, task)

    expected = reference_forward(state, x.numpy(), task, config)
    found = {"prediction": prediction, **aux}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Two float64 orders of summation over at most 15 terms of size ~1: a few units of 2^-52.
        np.testing.assert_allclose(found[name].numpy(), value, rtol=0, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("batch", [1, 8])
def test_aux_shapes(batch: int) -> None:
    prediction, aux = new_model(SMALL, seed=0).double()(rows(batch), 1)

    assert prediction.shape == (batch, 2)
    assert {name: tuple(value.shape) for name, value in aux.items()} == {
        "backbone_features": (batch, 6),
        "expert_features": (batch, 3, 5),
        "gate_weights": (batch, 3),
        "task_specific_features": (batch, 5),
    }


def test_routing_weights_are_positive_and_sum_to_one() -> None:
    _, aux = new_model(SMALL, seed=0).double().eval()(100.0 * rows(64), 0)

    weights = aux["gate_weights"]
    assert bool((weights >= 0).all())
    # A softmax over 3 entries in float64 rounds its sum by at most a few units of 2^-53.
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(64, dtype=torch.float64), rtol=0, atol=1e-15)


def test_trunk_and_tails_give_what_forward_gives() -> None:
    model = new_model(SMALL, seed=2).double().eval()
    x = rows(5)

    tails = model.tails(model.trunk(x), [1, 0])

    for task, (tail_prediction, tail_weights) in zip([1, 0], tails, strict=True):
        prediction, aux = model(x, task)
        assert torch.equal(prediction, tail_prediction)
        assert torch.equal(aux["gate_weights"], tail_weights)


def test_final_relu_changes_no_shape_and_makes_features_non_negative() -> None:
    config = TaskExpertConfig(**{**vars(SMALL), "final_relu": True})
    model = TaskExpertModel(config).double().eval()
    model.load_state_dict(new_model(SMALL, seed=3).double().state_dict())

    _, aux = model(rows(32), 0)

    assert aux["backbone_features"].min().item() == 0.0
    assert aux["expert_features"].min().item() == 0.0


def test_feature_fusion_is_used_by_no_prediction() -> None:
    model = new_model(SMALL, seed=4).double().eval()
    before, _ = model(rows(4), 0)
    with torch.no_grad():
        for parameter in model.feature_fusion.parameters():
            parameter.fill_(float("nan"))

    after, _ = model(rows(4), 0)

    assert torch.equal(before, after)


def test_utilization_is_the_mean_routing_weight_of_each_expert() -> None:
    model = new_model(SMALL, seed=5).double().eval()
    x = rows(40)

    utilization = model.get_expert_utilization(x, [1, 0])

    assert list(utilization) == ["task_1", "task_0"]
    for task in (0, 1):
        expected = model(x, task)[1]["gate_weights"].mean(dim=0).tolist()
        # Same operations on the same values; the mean may be split between threads differently.
        assert utilization[f"task_{task}"] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_dim": 0}, "input_dim is 0"),
        ({"backbone_dim": -1}, "backbone_dim is -1"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_tasks": 0, "task_output_dims": ()}, "num_tasks is 0"),
        ({"expert_dim": 1}, "expert_dim is 1"),
        ({"task_output_dims": (4, 0)}, r"task_output_dims\[1\] is 0"),
        ({"task_output_dims": (4,)}, "task_output_dims has 1 entries, num_tasks is 2"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": float("nan")}, "dropout is nan"),
    ],
)
def test_config_refuses_what_no_model_can_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskExpertConfig(**{**vars(SMALL), **changes})


def test_config_takes_a_list_of_output_dims_as_checkpoints_store_it() -> None:
    config = TaskExpertConfig(**{**vars(SMALL), "task_output_dims": [4, 2]})

    assert config == SMALL
    assert hash(config) == hash(SMALL)

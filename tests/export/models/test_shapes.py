"""The config is read off the shapes; what does not fit is listed whole, with the nearest name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from te_export.errors import CheckpointError
from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel
from te_export.models.task_expert_shapes import (
    check_shapes,
    expected_shapes,
    looks_like_task_expert,
    read_sizes,
    stored_in_out,
)

CONFIG = TaskExpertConfig(
    input_dim=11, backbone_dim=6, expert_dim=5, num_experts=4, num_tasks=2, task_output_dims=(3, 2)
)


@st.composite
def configs(draw: st.DrawFn) -> TaskExpertConfig:
    outputs = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    return TaskExpertConfig(
        input_dim=draw(st.integers(1, 50)),
        backbone_dim=draw(st.integers(1, 20)),
        expert_dim=draw(st.integers(2, 17)),
        num_experts=draw(st.integers(1, 12)),
        num_tasks=len(outputs),
        task_output_dims=tuple(outputs),
    )


def state_of(config: TaskExpertConfig) -> dict[str, torch.Tensor]:
    """Names and shapes only: the tensors have no data."""
    with torch.device("meta"):
        return dict(TaskExpertModel(config).state_dict())


def transposed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.t() if tensor.ndim == 2 else tensor for name, tensor in state.items()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(config=configs())
def test_every_config_is_read_off_its_shapes(config: TaskExpertConfig) -> None:
    state = state_of(config)

    sizes = read_sizes(state)

    found = TaskExpertConfig(**vars(sizes))
    assert found == config
    check_shapes(state, found, "its shapes")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(config=configs())
def test_the_storage_order_of_weights_is_told_from_the_biases(config: TaskExpertConfig) -> None:
    state = state_of(config)

    assert stored_in_out(state) is False
    assert stored_in_out(transposed(state)) is True


@pytest.mark.parametrize(
    "name",
    [
        "experts.1.network.3.weight",
        "experts.0.network.6.bias",
        "backbone.network.6.bias",
        "gating_networks.0.gate.0.weight",
        "gating_networks.1.gate.2.bias",
        "task_heads.1.head.0.weight",
        "feature_fusion.0.weight",
    ],
)
def test_one_damaged_tensor_is_found_out_by_the_others(name: str) -> None:
    state = state_of(CONFIG)
    right = list(state[name].shape)
    state[name] = torch.empty([axis + 1 for axis in right], device="meta")

    with pytest.raises(CheckpointError) as caught:
        check_shapes(state, TaskExpertConfig(**vars(read_sizes(state))), "its shapes")

    message = str(caught.value)
    assert f"misshaped  {name}: expected {right}, found {list(state[name].shape)}" in message
    assert message.startswith("1 tensor does not fit")


def test_missing_extra_and_misshaped_tensors_are_all_listed_with_the_nearest_name() -> None:
    state = state_of(CONFIG)
    state["experts.2.network.3.wieght"] = state.pop("experts.2.network.3.weight")
    del state["gating_networks.1.gate.0.bias"]
    state["optimizer_step"] = torch.empty((), device="meta")
    state["backbone.network.3.bias"] = torch.empty(7, device="meta")

    with pytest.raises(CheckpointError) as caught:
        check_shapes(state, CONFIG, "its shapes")

    lines = str(caught.value).splitlines()
    assert lines[0].startswith("5 tensors do not fit a TaskExpert model with its shapes")
    assert {line.strip() for line in lines[1:6]} == {
        "missing    experts.2.network.3.weight [5, 10] (nearest: experts.2.network.3.wieght)",
        "missing    gating_networks.1.gate.0.bias [5]",
        "unexpected experts.2.network.3.wieght [5, 10] (nearest: experts.2.network.3.weight)",
        "unexpected optimizer_step []",
        "misshaped  backbone.network.3.bias: expected [6], found [7]",
    }


def test_feature_fusion_may_be_absent_as_a_whole_and_not_in_part() -> None:
    state = state_of(CONFIG)
    del state["feature_fusion.0.weight"]
    with pytest.raises(CheckpointError, match=r"missing    feature_fusion\.0\.weight"):
        check_shapes(state, CONFIG, "its shapes")

    del state["feature_fusion.0.bias"]
    check_shapes(state, CONFIG, "its shapes")


@pytest.mark.parametrize("part", ["backbone", "experts", "gating_networks", "task_heads"])
def test_a_state_dict_without_one_of_the_parts_is_not_of_the_family(part: str) -> None:
    state = state_of(CONFIG)
    assert looks_like_task_expert(state)

    assert not looks_like_task_expert({n: t for n, t in state.items() if not n.startswith(part)})


def test_expected_shapes_allocate_nothing() -> None:
    config = TaskExpertConfig(input_dim=1_000_000, backbone_dim=1_000_000)  # 16 TB of weights

    shapes = expected_shapes(config)

    assert shapes["backbone.network.3.weight"] == (1_000_000, 2_000_000)


RENAMED: dict[str, Callable[[str], str]] = {
    "the only tensor that tells input_dim": lambda n: n.replace(
        "backbone.network.0.weight", "backbone.network.0.wieght"
    ),
    "all that tells one output": lambda n: n.replace("task_heads.1.", "task_head.1."),
}


@pytest.mark.parametrize("which", list(RENAMED))
def test_a_missing_tensor_that_alone_tells_a_size_is_named_too(which: str) -> None:
    before = state_of(CONFIG)
    state = {RENAMED[which](name): tensor for name, tensor in before.items()}
    (missing, *_) = before.keys() - state.keys()
    (extra, *_) = state.keys() - before.keys()

    with pytest.raises(CheckpointError) as caught:
        check_shapes(state, TaskExpertConfig(**vars(read_sizes(state))), "its shapes")

    assert missing in str(caught.value)
    assert extra in str(caught.value)


def test_one_stray_index_does_not_blow_up_the_listing() -> None:
    state = state_of(CONFIG)
    state["experts.2000.network.0.weight"] = torch.empty(10, 6, device="meta")

    with pytest.raises(CheckpointError) as caught:
        check_shapes(state, TaskExpertConfig(**vars(read_sizes(state))), "its shapes")

    message = str(caught.value)
    assert "experts.2000.network.0.weight" in message
    assert len(message.splitlines()) < 60  # the state dict itself has 56 tensors

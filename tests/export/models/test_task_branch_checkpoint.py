"""From a file to a task-branch model: told from other families, sizes from shapes, faults named."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from te_export.checkpoint import Checkpoint, read_checkpoint
from te_export.errors import CheckpointError, UsageError
from te_export.models.shared_component import SharedComponentConfig, SharedComponentModel
from te_export.models.shared_component_checkpoint import is_shared_component
from te_export.models.task_branch import TaskBranchConfig, TaskBranchModel
from te_export.models.task_branch_checkpoint import is_task_branch, load_task_branch
from te_export.models.task_branch_training import new_model, pretrain, save_checkpoint
from te_export.models.task_expert import TaskExpertModel
from te_export.models.task_expert_shapes import looks_like_task_expert

State = dict[str, torch.Tensor]
CheckpointOf = Callable[..., Checkpoint]

CONFIG = TaskBranchConfig(
    input_dim=5, shared_dim=7, branch_dim=4, output_dim=2, task_names=("a", "b", "c"), learning_rate=0.01
)


@pytest.fixture
def state() -> State:
    return {name: tensor.clone() for name, tensor in new_model(CONFIG, seed=0).state_dict().items()}


def test_a_saved_checkpoint_comes_back_with_its_config_and_numbers(tmp_path: Path) -> None:
    model = new_model(CONFIG, seed=1)
    x = 1000 + 10 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    pretrain(model, x, epochs=1, batch_rows=8, seed=0)
    save_checkpoint(tmp_path / "model.pt", model, epoch=1)

    loaded = load_task_branch(read_checkpoint(tmp_path / "model.pt"))

    assert isinstance(loaded.module, TaskBranchModel)
    assert loaded.module.config == CONFIG
    assert (loaded.family, loaded.input_name, loaded.input_shape) == ("TaskBranch", "x", (5,))
    assert loaded.task_names == ("a", "b", "c", "aggregate")
    assert loaded.config["task_names"] == "a,b,c"
    assert loaded.notes == ()
    assert (loaded.example_inputs.mean(dim=0) - x.mean(dim=0)).abs().max() < 10  # raw, not standardized
    with torch.no_grad():
        for name, expected in model(x).items():
            assert torch.equal(loaded.module(x)[name], expected)
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert not any(part.training for part in loaded.module.modules())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(sizes=st.tuples(*[st.integers(1, 9)] * 4), tasks=st.integers(1, 5))
def test_every_config_is_read_off_the_shapes(sizes: tuple[int, int, int, int], tasks: int) -> None:
    config = TaskBranchConfig(*sizes, task_names=tuple(f"task_{i}" for i in range(tasks)))
    state = new_model(config, seed=0).state_dict()
    checkpoint = Checkpoint(Path("model.pt"), "0" * 64, 1, "torch-zip", state, None, None, None, {}, ())

    loaded = load_task_branch(checkpoint)

    assert isinstance(loaded.module, TaskBranchModel)
    assert loaded.module.config == config


@pytest.mark.parametrize("part", ["shared", "branches", "task_weights"])
def test_a_state_dict_without_one_of_the_parts_is_not_of_the_family(part: str, state: State) -> None:
    assert is_task_branch(state)
    assert not is_task_branch({n: t for n, t in state.items() if not n.startswith(part)})


def test_no_family_claims_anothers(state: State, make_model: Callable[..., TaskExpertModel]) -> None:
    states = {
        looks_like_task_expert: make_model().state_dict(),
        is_shared_component: SharedComponentModel(SharedComponentConfig()).state_dict(),
        is_task_branch: state,
    }

    for claims in states:
        for owner, each in states.items():
            assert claims(each) is (claims is owner)
    assert not is_task_branch({**state, **states[looks_like_task_expert]})
    assert not is_task_branch({**state, **states[is_shared_component]})


def test_another_state_dict_is_refused_with_its_first_names(checkpoint_of: CheckpointOf) -> None:
    with pytest.raises(
        CheckpointError, match=r"folder/model\.pt: not a task-branch checkpoint: .*found layer0"
    ):
        load_task_branch(checkpoint_of({f"layer{i}.weight": torch.zeros(2, 1) for i in range(20)}))


def test_missing_extra_and_misshaped_tensors_are_all_listed(
    state: State, checkpoint_of: CheckpointOf
) -> None:
    state["branches.1.2.wieght"] = state.pop("branches.1.2.weight")
    del state["standardize.scale"]
    state["branches.0.0.bias"] = torch.zeros(9)

    with pytest.raises(CheckpointError) as caught:
        load_task_branch(checkpoint_of(state))

    lines = str(caught.value).splitlines()
    assert lines[0].startswith("folder/model.pt: 4 tensors do not fit a task-branch model")
    assert {line.strip() for line in lines[1:5]} == {
        "missing    branches.1.2.weight [2, 4] (nearest: branches.1.2.wieght)",
        "missing    standardize.scale [5]",
        "unexpected branches.1.2.wieght [2, 4] (nearest: branches.1.2.weight)",
        "misshaped  branches.0.0.bias: expected [4], found [9]",
    }


@pytest.mark.parametrize(
    "name", ["standardize.mean", "shared.bias", "branches.2.0.weight", "branches.0.2.bias"]
)
def test_one_damaged_tensor_is_found_out_by_the_others(
    name: str, state: State, checkpoint_of: CheckpointOf
) -> None:
    right = list(state[name].shape)
    state[name] = torch.zeros([size + 1 for size in right])

    with pytest.raises(CheckpointError) as caught:
        load_task_branch(checkpoint_of(state))

    assert f"misshaped  {name}: expected {right}, found {list(state[name].shape)}" in str(caught.value)
    assert "1 tensor does not fit" in str(caught.value)


def test_a_missing_last_branch_is_known_by_its_weight(state: State, checkpoint_of: CheckpointOf) -> None:
    left = {name: tensor for name, tensor in state.items() if not name.startswith("branches.2")}

    with pytest.raises(CheckpointError, match=r"missing    branches\.2\.0\.weight \[4, 7\]"):
        load_task_branch(checkpoint_of(left))


def test_a_size_that_nothing_tells_is_named(state: State, checkpoint_of: CheckpointOf) -> None:
    left = {name: tensor for name, tensor in state.items() if ".2." not in name}

    with pytest.raises(
        CheckpointError, match=r"nothing tells output_dim: expected tensors named branches\.N\.2"
    ):
        load_task_branch(checkpoint_of(left))


def test_a_config_that_the_tensors_contradict_is_refused_with_both_values(
    state: State, checkpoint_of: CheckpointOf
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_task_branch(checkpoint_of(state, config={"shared_dim": 8, "input_dim": 5}))

    assert "shared_dim: 8 in 'config' (a dict), 7 by the tensors" in str(caught.value)
    assert "input_dim" not in str(caught.value)


def test_a_scale_that_is_not_positive_is_refused(state: State, checkpoint_of: CheckpointOf) -> None:
    state["standardize.scale"][3] = 0.0

    with pytest.raises(
        CheckpointError, match=r"standardize\.scale is not positive for 1 of 5 inputs .*: 3\)"
    ):
        load_task_branch(checkpoint_of(state))


def test_weights_that_are_no_finite_floats_are_refused_by_name(
    state: State, checkpoint_of: CheckpointOf
) -> None:
    state["task_weights.logits"][0] = -math.inf
    with pytest.raises(CheckpointError, match=r"task_weights\.logits: 0 NaN and 1 infinite of 3"):
        load_task_branch(checkpoint_of(state))

    state["task_weights.logits"] = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=r"1 tensors have dtype torch\.int32"):
        load_task_branch(checkpoint_of(state))


def test_other_layers_in_a_pickled_module_are_refused(state: State, checkpoint_of: CheckpointOf) -> None:
    types = {path: type(module).__name__ for path, module in TaskBranchModel(CONFIG).named_modules()}
    load_task_branch(checkpoint_of(state, layer_types=types))

    with pytest.raises(CheckpointError, match=r"branches\.0\.1 is Tanh, expected ReLU"):
        load_task_branch(checkpoint_of(state, layer_types={**types, "branches.0.1": "Tanh"}))


def test_no_task_is_named_like_the_aggregate(state: State, checkpoint_of: CheckpointOf) -> None:
    with pytest.raises(UsageError, match="the output that is the weighted sum"):
        load_task_branch(checkpoint_of(state), task_names=("a", "b", "Aggregate"))
    assert load_task_branch(checkpoint_of(state)).task_names == ("task_0", "task_1", "task_2", "aggregate")

"""From a file to a shared-component model: told from other families, sizes from shapes, faults named."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from te_export.checkpoint import Checkpoint, read_checkpoint
from te_export.errors import CheckpointError, UsageError
from te_export.models.shared_component import SharedComponentConfig, SharedComponentModel
from te_export.models.shared_component_checkpoint import is_shared_component, load_shared_component
from te_export.models.shared_component_training import new_model, save_checkpoint
from te_export.models.task_expert import TaskExpertModel

State = dict[str, torch.Tensor]
CheckpointOf = Callable[..., Checkpoint]

CONFIG = SharedComponentConfig(
    component_kinds=("convolutional", "dense", "profile"),
    component_widths=(2, 5, 4),
    feature_dim=6,
    gate_dim=7,
    task_names=("digit", "box", "ink"),
    task_kinds=("classes", "box", "classes"),
    task_output_dims=(5, 4, 3),
    routing_kinds=("learned", "fixed", "learned"),
)


@pytest.fixture
def state() -> State:
    return {name: tensor.clone() for name, tensor in new_model(CONFIG, seed=0).state_dict().items()}


def test_a_saved_checkpoint_comes_back_with_its_config_and_numbers(tmp_path: Path) -> None:
    model = new_model(CONFIG, seed=1).eval()
    model.fix_routing("box", (0.2, 0.8, 0.0))
    save_checkpoint(tmp_path / "model.pt", model, epoch=1)

    loaded = load_shared_component(read_checkpoint(tmp_path / "model.pt"))

    assert isinstance(loaded.module, SharedComponentModel)
    assert loaded.module.config == CONFIG
    assert (loaded.family, loaded.input_name, loaded.input_shape) == ("SharedComponent", "x", (3, 32, 32))
    assert loaded.task_names == CONFIG.task_names
    assert loaded.config["component_kinds"] == "convolutional,dense,profile"
    assert loaded.config["component_widths"] == (2, 5, 4)
    assert loaded.notes == ()
    x = loaded.example_inputs
    assert x.shape == (64, 3, 32, 32)
    assert 0.0 <= x.min() < x.max() <= 1.0
    with torch.no_grad():
        for name, expected in model(x).items():
            assert torch.equal(loaded.module(x)[name], expected)
    assert not any(part.training for part in loaded.module.modules())
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


@st.composite
def configs(draw: st.DrawFn) -> SharedComponentConfig:
    kinds = draw(st.lists(st.sampled_from(["convolutional", "dense", "profile"]), min_size=1, max_size=4))
    tasks = draw(st.integers(1, 3))
    return replace(
        CONFIG,
        component_kinds=tuple(kinds),
        component_widths=tuple(draw(st.integers(1, 6)) for _ in kinds),
        feature_dim=draw(st.integers(1, 8)),
        gate_dim=draw(st.integers(1, 6)),
        task_names=tuple(f"task_{task}" for task in range(tasks)),
        task_kinds=("classes",) * tasks,
        task_output_dims=tuple(draw(st.integers(1, 6)) for _ in range(tasks)),
        routing_kinds=("learned", *(draw(st.sampled_from(["learned", "fixed"])) for _ in range(tasks - 1))),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(config=configs())
def test_every_config_is_read_off_names_and_shapes(config: SharedComponentConfig) -> None:
    state = new_model(config, seed=0).state_dict()
    checkpoint = Checkpoint(Path("model.pt"), "0" * 64, 1, "torch-zip", state, None, None, None, {}, ())

    loaded = load_shared_component(checkpoint)

    assert isinstance(loaded.module, SharedComponentModel)
    assert loaded.module.config == config


def test_other_image_shapes_are_the_configs_to_say(checkpoint_of: CheckpointOf) -> None:
    small = replace(CONFIG, image_shape=(1, 8, 12))
    state = new_model(small, seed=0).state_dict()

    loaded = load_shared_component(checkpoint_of(state, config={"image_shape": (1, 8, 12)}))

    assert loaded.input_shape == (1, 8, 12)
    with pytest.raises(CheckpointError, match=r"of image_shape \[3, 32, 32\] with the sizes") as caught:
        load_shared_component(checkpoint_of(state))
    assert "misshaped  components.1.dense.1.weight: expected [5, 3072], found [5, 96]" in str(caught.value)


@pytest.mark.parametrize("part", ["components", "routing", "heads"])
def test_a_state_dict_without_one_of_the_parts_is_not_of_the_family(part: str, state: State) -> None:
    assert is_shared_component(state)
    assert not is_shared_component({n: t for n, t in state.items() if not n.startswith(part)})


def test_other_families_are_never_claimed(state: State, make_model: Callable[..., TaskExpertModel]) -> None:
    task_expert = make_model().state_dict()

    assert not is_shared_component(task_expert)
    assert not is_shared_component({**state, **task_expert})
    assert not is_shared_component({**state, "branches.0.0.weight": torch.zeros(1, 1)})


def test_another_state_dict_is_refused_with_its_first_names(checkpoint_of: CheckpointOf) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_shared_component(checkpoint_of({f"layer{i}.weight": torch.zeros(2, 1) for i in range(20)}))

    message = str(caught.value)
    assert message.startswith("folder/model.pt: not a shared-component checkpoint: expected tensors named")
    assert "found layer0.weight, layer1.weight" in message


def test_missing_extra_and_misshaped_tensors_are_all_listed(
    state: State, checkpoint_of: CheckpointOf
) -> None:
    state["components.1.dense.1.wieght"] = state.pop("components.1.dense.1.weight")
    state["components.0.convolutional.3.weight"] = torch.zeros(4, 2, 5, 5)
    del state["routing.2.gate.2.bias"]

    with pytest.raises(CheckpointError) as caught:
        load_shared_component(checkpoint_of(state))

    lines = str(caught.value).splitlines()
    assert lines[0].startswith("folder/model.pt: 4 tensors do not fit a shared-component model")
    assert {line.strip() for line in lines[1:5]} == {
        "missing    components.1.dense.1.weight [5, 3072] (nearest: components.1.dense.1.wieght)",
        "missing    routing.2.gate.2.bias [3]",
        "unexpected components.1.dense.1.wieght [5, 3072] (nearest: components.1.dense.1.weight)",
        "misshaped  components.0.convolutional.3.weight: expected [4, 2, 3, 3], found [4, 2, 5, 5]",
    }


@pytest.mark.parametrize(
    "name", ["components.2.profile.2.bias", "heads.0.weight", "routing.0.gate.0.weight", "routing.1.logits"]
)
def test_one_damaged_tensor_is_found_out_by_the_others(
    name: str, state: State, checkpoint_of: CheckpointOf
) -> None:
    right = list(state[name].shape)
    state[name] = torch.zeros([*right[:-1], right[-1] + 1])

    with pytest.raises(CheckpointError) as caught:
        load_shared_component(checkpoint_of(state))

    assert f"misshaped  {name}: expected {right}, found {list(state[name].shape)}" in str(caught.value)
    assert "1 tensor does not fit" in str(caught.value)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("components.1.", "component 1 is missing: expected tensors named components.1.<kind>"),
        ("heads.1.", "nothing tells out of task 1: expected tensors named heads.1"),
        ("routing.0.", "missing    routing.0.gate.0.weight"),
    ],
)
def test_a_part_that_is_missing_is_named(
    prefix: str, message: str, state: State, checkpoint_of: CheckpointOf
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_shared_component(
            checkpoint_of({name: tensor for name, tensor in state.items() if not name.startswith(prefix)})
        )

    assert message in str(caught.value)


def test_a_config_that_the_tensors_contradict_is_refused_with_both_values(
    state: State, checkpoint_of: CheckpointOf
) -> None:
    config = {"feature_dim": 9, "component_kinds": ("dense", "dense", "profile"), "gate_dim": 7}

    with pytest.raises(CheckpointError) as caught:
        load_shared_component(checkpoint_of(state, config=config))

    message = str(caught.value)
    assert "feature_dim: 9 in 'config' (a dict), 6 by the tensors" in message
    assert (
        "component_kinds: ['dense', 'dense', 'profile'] in 'config' (a dict), ['convolutional', " in message
    )
    assert "gate_dim" not in message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_shape": (3, 32)}, r"image_shape in 'config' \(a dict\) is \[3, 32\], expected channels"),
        ({"image_shape": (3, 0, 32)}, r"is \[3, 0, 32\], expected channels, height and width"),
        ({"image_shape": (3, 2**20, 2**20)}, "at most 67108864 values"),
        ({"image_shape": "3,32,32"}, "is '3,32,32', expected channels"),
        ({"image_shape": (3, 30, 32)}, "no shared-component model has this config: image_shape is"),
        (
            {"task_kinds": ("classes", "box")},
            "task_kinds in .* expected one of classes and box for each of 3",
        ),
        ({"task_kinds": ("classes", "box", "mask")}, "task_kinds in"),
        ({"task_kinds": 3}, "task_kinds in .* is 3"),
    ],
)
def test_config_values_that_make_no_sense_are_refused(
    config: dict[str, object], message: str, state: State, checkpoint_of: CheckpointOf
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_shared_component(checkpoint_of(state, config=config))


def test_weights_that_are_no_finite_floats_are_refused_by_name(
    state: State, checkpoint_of: CheckpointOf
) -> None:
    state["heads.2.bias"][1] = math.nan
    state["routing.1.logits"][0] = -math.inf
    with pytest.raises(CheckpointError) as caught:
        load_shared_component(checkpoint_of(state))
    assert "2 tensors hold values that are NaN or infinite in float32" in str(caught.value)
    assert "heads.2.bias: 1 NaN and 0 infinite of 3" in str(caught.value)

    state["heads.2.bias"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(
        CheckpointError, match=r"1 tensors have dtype torch\.int64, expected .*: heads\.2\.bias"
    ):
        load_shared_component(checkpoint_of(state))


def test_other_floats_are_converted_with_a_note(state: State, checkpoint_of: CheckpointOf) -> None:
    halves = {name: tensor.half() for name, tensor in state.items()}

    loaded = load_shared_component(checkpoint_of(halves))

    assert loaded.notes == ("float16 weights were converted to float32",)
    assert {tensor.dtype for tensor in loaded.module.state_dict().values()} == {torch.float32}


def test_other_layers_in_a_pickled_module_are_refused(state: State, checkpoint_of: CheckpointOf) -> None:
    types = {path: type(module).__name__ for path, module in SharedComponentModel(CONFIG).named_modules()}
    load_shared_component(checkpoint_of(state, layer_types=types))

    with pytest.raises(CheckpointError, match=r"components\.1\.dense\.2 is GELU, expected ReLU"):
        load_shared_component(checkpoint_of(state, layer_types={**types, "components.1.dense.2": "GELU"}))
    with pytest.raises(CheckpointError, match="norm is LayerNorm, expected no such layer"):
        load_shared_component(checkpoint_of(state, layer_types={**types, "norm": "LayerNorm"}))


def test_task_names_are_those_given_then_those_in_the_file(state: State, checkpoint_of: CheckpointOf) -> None:
    in_file = checkpoint_of(state, task_names=("a", "b", "c"))

    assert load_shared_component(in_file).task_names == ("a", "b", "c")
    loaded = load_shared_component(in_file, task_names=("x", "y", "z"))
    assert list(loaded.module(loaded.example_inputs)) == ["x", "y", "z"]
    assert load_shared_component(checkpoint_of(state)).task_names == ("task_0", "task_1", "task_2")
    with pytest.raises(UsageError, match="gives 2 names"):
        load_shared_component(in_file, task_names=("x", "y"))

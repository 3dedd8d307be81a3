"""From what a file held to a model that can be captured: right weights, right config, or a clear refusal."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from te_export.errors import CheckpointError, UsageError
from te_export.models.exportable import ExportableModel
from te_export.models.task_expert import TaskExpertModel

State = dict[str, torch.Tensor]
MakeModel = Callable[..., TaskExpertModel]
Load = Callable[..., ExportableModel]


@pytest.fixture
def state(make_model: MakeModel) -> State:
    return {name: tensor.clone() for name, tensor in make_model().state_dict().items()}


def outputs(model: ExportableModel) -> list[torch.Tensor]:
    (spec,) = model.inputs
    assert (spec.name, spec.dtype, spec.shape) == ("x", "float32", (20,))
    x = torch.linspace(-3, 3, 5 * 20).reshape(5, 20)
    with torch.no_grad():
        return list(model.module(x))


def test_the_joint_module_answers_what_the_model_answers_task_by_task(
    make_model: MakeModel, load: Load
) -> None:
    model = make_model()
    joint = load(model.state_dict())
    x = torch.linspace(-3, 3, 5 * 20).reshape(5, 20)

    found = outputs(joint)

    assert joint.task_names == ("task_0", "task_1", "task_2")
    for task in range(3):
        with torch.no_grad():
            prediction, aux = model(x, task)
        assert torch.equal(found[1 + 2 * task], prediction)
        assert torch.equal(found[2 + 2 * task], aux["gate_weights"])
    assert torch.equal(found[0], aux["expert_features"])


def test_float32_weights_are_used_without_a_copy(state: State, load: Load) -> None:
    held = load(state).module.state_dict()

    for name in ("backbone.network.3.weight", "task_heads.2.head.3.bias"):
        assert held[f"model.{name}"].data_ptr() == state[name].data_ptr()


def test_the_model_is_in_eval_mode_and_asks_for_no_gradients(state: State, load: Load) -> None:
    module = load(state).module

    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_weights_are_converted_exactly_as_torch_does(
    dtype: torch.dtype, state: State, load: Load
) -> None:
    narrow = {name: tensor.to(dtype) for name, tensor in state.items()}

    model = load(narrow)

    expected = load({name: tensor.float() for name, tensor in narrow.items()})
    for found, wanted in zip(outputs(model), outputs(expected), strict=True):
        assert torch.equal(found, wanted)
    assert f"{str(dtype).removeprefix('torch.')} weights were converted to float32" in model.notes


def test_a_mixture_of_dtypes_is_named(state: State, load: Load) -> None:
    state["experts.0.network.0.bias"] = state["experts.0.network.0.bias"].half()
    state["experts.1.network.0.bias"] = state["experts.1.network.0.bias"].bfloat16()

    assert "bfloat16 and float16 weights were converted to float32" in load(state).notes


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_refused_by_name(dtype: torch.dtype, state: State, load: Load) -> None:
    state["experts.1.network.3.weight"] = torch.zeros(8, 16, dtype=dtype)

    with pytest.raises(CheckpointError) as caught:
        load(state)

    assert f"dtype {dtype}, expected" in str(caught.value)
    assert "experts.1.network.3.weight" in str(caught.value)


def test_weights_stored_in_out_give_the_same_numbers(state: State, load: Load) -> None:
    stored = {n: t.t().contiguous() if t.ndim == 2 else t for n, t in state.items()}

    model = load(stored)

    for found, wanted in zip(outputs(model), outputs(load(state)), strict=True):
        assert torch.equal(found, wanted)
    assert "weights are stored (in, out); they were transposed to torch's (out, in)" in model.notes


def test_final_relu_of_the_config_is_every_networks_last_layer(
    make_model: MakeModel, state: State, load: Load
) -> None:
    x = torch.linspace(-3, 3, 5 * 20).reshape(5, 20)
    with torch.no_grad():
        wanted = make_model(final_relu=True).trunk(x)

    model = load(state, config={"final_relu": True})

    assert model.config["final_relu"] is True
    found = outputs(model)[0]
    assert torch.equal(found, wanted)
    assert not torch.equal(found, outputs(load(state))[0].relu())  # the backbone's ReLU counts as well


@pytest.mark.parametrize("value", [1, 0, "true", 1.0])
def test_final_relu_must_be_true_or_false(value: object, state: State, load: Load) -> None:
    with pytest.raises(CheckpointError, match=r"final_relu.*expected true or false"):
        load(state, config={"final_relu": value})


def test_a_config_that_the_tensors_contradict_is_refused_with_both_values(state: State, load: Load) -> None:
    config = {
        "num_experts": 9,
        "expert_dim": 8,
        "task_output_dims": (4, 2, 4),
        "input_dim": "20",
        "num_tasks": None,
    }

    with pytest.raises(CheckpointError) as caught:
        load(state, config=config)

    message = str(caught.value)
    assert "num_experts: 9 in 'config' (a dict), 3 by the shapes of the tensors" in message
    assert "task_output_dims: [4, 2, 4] in 'config' (a dict), [4, 1, 4] by the shapes" in message
    assert "input_dim: 20 in" in message
    assert "expert_dim:" not in message
    assert "num_tasks" not in message


def test_a_config_that_agrees_is_kept_with_its_training_settings(state: State, load: Load) -> None:
    config = {"num_experts": 3, "task_output_dims": (4, 1, 4), "dropout": 0.25, "learning_rate": 1, "x": 2}

    model = load(state, config=config)

    assert model.config["dropout"] == 0.25
    assert model.config["learning_rate"] == 1.0
    assert any("were ignored: " in note and "x" in note.split(": ")[1] for note in model.notes)


@pytest.mark.parametrize(
    "config",
    [
        {"learning_rate": math.inf},
        {"weight_decay": math.nan},
        {"learning_rate": 10**400},
        {"dropout": "0.1", "learning_rate": True},
    ],
)
def test_training_settings_that_are_no_usable_numbers_never_reach_the_manifest(
    config: dict[str, object], state: State, load: Load
) -> None:
    kept = load(state, config=config).config

    for value in kept.values():
        assert not isinstance(value, float) or math.isfinite(value)


def test_nan_and_infinite_values_are_counted_per_tensor(state: State, load: Load) -> None:
    state["experts.1.network.3.weight"][:2, 0] = math.nan
    state["experts.1.network.3.weight"][0, 1] = -math.inf
    state["task_heads.0.head.3.bias"][0] = math.inf

    with pytest.raises(CheckpointError) as caught:
        load(state)

    message = str(caught.value)
    assert message.startswith("folder/model.pt: 2 tensors hold values that are NaN or infinite in float32")
    assert "experts.1.network.3.weight: 2 NaN and 1 infinite of 128" in message
    assert "task_heads.0.head.3.bias: 0 NaN and 1 infinite of 4" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_nan_is_found_in_every_dtype(dtype: torch.dtype, state: State, load: Load) -> None:
    wide = {name: tensor.to(dtype) for name, tensor in state.items()}
    wide["backbone.network.6.bias"][3] = math.nan

    with pytest.raises(CheckpointError, match=r"backbone\.network\.6\.bias: 1 NaN and 0 infinite of 24"):
        load(wide)


def test_a_float64_value_beyond_float32_is_refused_by_name(state: State, load: Load) -> None:
    wide = {name: tensor.double() for name, tensor in state.items()}
    wide["backbone.network.3.weight"][0, 0] = 1e39

    with pytest.raises(CheckpointError, match=r"backbone\.network\.3\.weight"):
        load(wide)


def test_a_state_dict_of_another_model_is_refused_with_its_first_tensors(load: Load) -> None:
    with pytest.raises(CheckpointError) as caught:
        load({f"layer{i}.weight": torch.zeros(2, i + 1) for i in range(20)})

    message = str(caught.value)
    assert "not a TaskExpert checkpoint" in message
    assert "found 20 tensors" in message
    assert "layer0.weight [2, 1]" in message
    assert len(message.splitlines()) < 15


def test_a_subset_of_tasks_leaves_the_others_weights_out(state: State, load: Load) -> None:
    model = load(state, tasks=("b", "a"), names=("a", "b", "c"))

    assert model.task_names == ("b", "a")
    assert [task.output_dim for task in model.tasks] == [1, 4]
    held = {name.removeprefix("model.") for name in model.module.state_dict()}
    assert held == model.used_parameters
    assert not any(name.startswith(("gating_networks.2", "task_heads.2")) for name in held)
    assert {name for name in state if name not in held} == set(model.unused_parameters)
    full = outputs(load(state))
    for found, wanted in zip(outputs(model)[1:], [full[3], full[4], full[1], full[2]], strict=True):
        assert torch.equal(found, wanted)


def test_unused_weights_may_hold_anything_but_are_still_checked(state: State, load: Load) -> None:
    state["feature_fusion.0.weight"][0, 0] = math.nan

    with pytest.raises(CheckpointError, match="feature_fusion"):
        load(state)


def test_feature_fusion_is_reported_as_present_and_unused(state: State, load: Load) -> None:
    model = load(state)

    assert set(model.unused_parameters) == {"feature_fusion.0.weight", "feature_fusion.0.bias"}
    assert any("feature_fusion.0.weight" in note and "used by no prediction" in note for note in model.notes)
    without = load({n: t for n, t in state.items() if not n.startswith("feature_fusion")})
    assert without.unused_parameters == ()
    assert without.notes == ()


def test_names_in_the_file_are_used_and_may_be_replaced(state: State, load: Load) -> None:
    in_file = ("click", "buy", "like")

    assert load(state, task_names=in_file).task_names == in_file
    assert load(state, task_names=in_file, names=("a", "b", "c")).task_names == ("a", "b", "c")
    with pytest.raises(UsageError, match="no such task"):
        load(state, task_names=in_file, tasks=("task_0",))


def test_sizes_of_the_parameters_are_those_of_the_used_ones_in_float32(state: State, load: Load) -> None:
    model = load({name: tensor.double() for name, tensor in state.items()}, tasks=("task_1",))

    expected = sum(state[name].numel() * 4 for name in model.used_parameters)
    assert model.parameter_bytes == expected
    assert "feature_fusion.0.weight" not in model.used_parameters

"""TaskExpert with a convolutional backbone: its arithmetic, and its sizes from the tensors alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import te_export
import te_runtime
from te_export.checkpoint import Checkpoint, read_checkpoint
from te_export.errors import CheckpointError
from te_export.models.exportable import ExportableModel
from te_export.models.task_expert import ConvolutionalTaskExpertConfig, TaskExpertConfig, TaskExpertModel
from te_export.models.task_expert_checkpoint import load_task_expert
from te_export.models.task_expert_training import TaskExpertTrainer, evaluate, new_model, save_checkpoint

Array = NDArray[np.float64]
State = dict[str, torch.Tensor]
Load = Callable[..., ExportableModel]

SMALL = ConvolutionalTaskExpertConfig(
    input_shape=(2, 8, 8),
    convolution_channels=(3, 4),
    backbone_dim=6,
    expert_dim=5,
    num_experts=3,
    num_tasks=2,
    task_output_dims=(4, 2),
    dropout=0.0,
)
WIDE = replace(SMALL, input_shape=(2, 8, 12), input_dim=0)


@pytest.fixture
def state() -> State:
    return {name: tensor.clone() for name, tensor in new_model(SMALL, seed=0).state_dict().items()}


def convolved(x: Array, weight: Array, bias: Array) -> Array:
    """3 x 3 cross-correlation over an image with a border of zeros: (B, C, H, W) → (B, out, H, W)."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))  # (B, C, H, W, 3, 3)
    result: Array = np.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]
    return result


@pytest.mark.parametrize("final_relu", [False, True])
def test_the_backbone_is_its_definition_in_float64(final_relu: bool) -> None:
    model = new_model(replace(WIDE, final_relu=final_relu), seed=1).double().eval()
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 2, 8, 12)))
    value = x.numpy()
    weights = {name: tensor.numpy() for name, tensor in model.backbone.state_dict().items()}
    for layer in (0, 3):
        name = f"convolutions.{layer}"
        value = np.maximum(convolved(value, weights[f"{name}.weight"], weights[f"{name}.bias"]), 0)
        rows, channels, height, width = value.shape
        value = value.reshape(rows, channels, height // 2, 2, width // 2, 2).max(axis=(3, 5))
    expected = value.reshape(5, -1) @ weights["projection.weight"].T + weights["projection.bias"]

    with torch.no_grad():
        prediction, aux = model(x, 0)

    if final_relu:
        expected = np.maximum(expected, 0)
    # float64 sums of at most 36 terms of size 1.
    np.testing.assert_allclose(aux["backbone_features"].numpy(), expected, rtol=1e-12, atol=1e-13)
    assert prediction.shape == (5, 4)


def test_only_the_backbone_differs_from_the_linear_model() -> None:
    linear = TaskExpertConfig(
        **{name: value for name, value in asdict(SMALL).items() if name in TaskExpertConfig.__annotations__}
    )
    shapes = [
        {name: tuple(t.shape) for name, t in TaskExpertModel(config).state_dict().items()}
        for config in (SMALL, linear)
    ]

    backbones = [{n: s for n, s in each.items() if n.startswith("backbone.")} for each in shapes]
    assert backbones[0] == {
        "backbone.convolutions.0.weight": (3, 2, 3, 3),
        "backbone.convolutions.0.bias": (3,),
        "backbone.convolutions.3.weight": (4, 3, 3, 3),
        "backbone.convolutions.3.bias": (4,),
        "backbone.projection.weight": (6, 16),
        "backbone.projection.bias": (6,),
    }
    assert all(name.startswith("backbone.network.") for name in backbones[1])
    rest = [{n: s for n, s in each.items() if not n.startswith("backbone.")} for each in shapes]
    assert rest[0] == rest[1]


@st.composite
def configs(draw: st.DrawFn) -> ConvolutionalTaskExpertConfig:
    channels = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    side = draw(st.integers(1, 4)) * 2 ** len(channels)
    outputs = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    return ConvolutionalTaskExpertConfig(
        input_shape=(draw(st.integers(1, 4)), side, side),
        convolution_channels=channels,
        backbone_dim=draw(st.integers(1, 8)),
        expert_dim=draw(st.integers(2, 8)),
        num_experts=draw(st.integers(1, 4)),
        num_tasks=len(outputs),
        task_output_dims=outputs,
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(config=configs())
def test_every_config_of_square_images_is_read_off_the_tensors(config: ConvolutionalTaskExpertConfig) -> None:
    state = new_model(config, seed=0).state_dict()
    checkpoint = Checkpoint(Path("model.pt"), "0" * 64, 1, "torch-zip", state, None, None, None, {}, ())

    loaded = load_task_expert(checkpoint, task_names=None, tasks=None)

    assert loaded.config == asdict(config)
    assert loaded.inputs[0].shape == config.input_shape


def test_images_that_are_not_square_are_the_configs_to_say(load: Load) -> None:
    state = new_model(WIDE, seed=0).state_dict()

    loaded = load(state, config={"input_shape": (2, 8, 12)})

    assert loaded.inputs[0].shape == (2, 8, 12)
    with pytest.raises(
        CheckpointError, match=r"reads 24 values, expected those of a square image in 4 channels"
    ):
        load(state)
    with pytest.raises(CheckpointError, match=r"projection\.weight: expected \[6, 32\], found \[6, 24\]"):
        load(state, config={"input_shape": (2, 8, 16)})


def test_the_loaded_module_answers_what_the_model_answers(tmp_path: Path) -> None:
    model = new_model(WIDE, seed=2)
    trainer = TaskExpertTrainer(model)
    save_checkpoint(tmp_path / "model.pt", model, epoch=1, optimizer=trainer.optimizer, task_names=["a", "b"])

    loaded = load_task_expert(read_checkpoint(tmp_path / "model.pt"), task_names=None, tasks=("b",))

    x = torch.rand(3, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, prediction, weights = loaded.module(x)
        expected, aux = model.eval()(x, 1)
    assert torch.equal(prediction, expected)
    assert torch.equal(weights, aux["gate_weights"])
    assert loaded.config == asdict(WIDE)
    places = 9 * (2 * 3 * 8 * 12 + 3 * 4 * 4 * 6)
    assert loaded.multiply_adds == loaded.parameter_bytes // 4 + places


def test_a_step_trains_the_convolutions_too() -> None:
    wide = replace(SMALL, convolution_channels=(8, 8), backbone_dim=24, expert_dim=12, learning_rate=1e-2)
    model = new_model(wide, seed=0)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 64)
    images = rng.random((64, 2, 8, 8)) * 0.2
    images[:, 0, 2:5, 2:5] += labels[:, None, None]
    x, target = torch.from_numpy(images).float(), torch.from_numpy(labels)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = TaskExpertTrainer(model)

    losses = [trainer.step([x, x], [target, target]).total for _ in range(60)]

    assert losses[-1] < losses[0] - 0.8  # diversity alone can lower it by 0.2
    assert evaluate(model, [x, x], [target, target]).mean_accuracy > 0.95
    after = model.state_dict()
    assert all(not torch.equal(before[n], after[n]) for n in before if n.startswith("backbone."))


def test_missing_and_misshaped_convolutions_are_listed(state: State, load: Load) -> None:
    state["backbone.convolutions.3.wieght"] = state.pop("backbone.convolutions.3.weight")
    state["backbone.convolutions.0.bias"] = torch.zeros(7)

    with pytest.raises(CheckpointError) as caught:
        load(state)

    assert {line.strip() for line in str(caught.value).splitlines()[1:4]} == {
        "missing    backbone.convolutions.3.weight [4, 3, 3, 3] (nearest: backbone.convolutions.3.wieght)",
        "unexpected backbone.convolutions.3.wieght [4, 3, 3, 3] (nearest: backbone.convolutions.3.weight)",
        "misshaped  backbone.convolutions.0.bias: expected [3], found [7]",
    }


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (
            "backbone.projection.",
            "nothing tells the shape of an image: expected backbone.convolutions.0.weight",
        ),
        (
            "backbone.convolutions.0.",
            "nothing tells channels after backbone.convolutions.0: expected tensors",
        ),
        ("backbone.convolutions.", "missing    backbone.network.0.weight"),
    ],
)
def test_a_part_that_is_missing_is_named(prefix: str, message: str, state: State, load: Load) -> None:
    left = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    if prefix == "backbone.convolutions.":
        left["backbone.network.0.bias"] = torch.zeros(12)  # a linear backbone, of which all else is missing

    with pytest.raises(CheckpointError) as caught:
        load(left)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"convolution_channels": (3, 5)}, r"convolution_channels: \[3, 5\] in .*, \[3, 4\] by the shapes"),
        ({"input_dim": 100}, r"input_dim: 100 in .*, 128 by the shapes"),
        ({"input_shape": (2, 9, 8)}, "no TaskExpert model has this config: input_shape is"),
        ({"input_shape": 8}, r"input_shape in 'config' \(a dict\) is 8, expected channels"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    config: dict[str, object], message: str, state: State, load: Load
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(state, config=config)


def test_nan_in_a_convolution_is_refused(state: State, load: Load) -> None:
    state["backbone.convolutions.3.weight"][0, 0, 1, 1] = math.nan

    with pytest.raises(CheckpointError, match=r"convolutions\.3\.weight: 1 NaN and 0 infinite of 108"):
        load(state)


def test_layers_of_a_pickled_module_are_checked(state: State, load: Load) -> None:
    types = {path: type(module).__name__ for path, module in TaskExpertModel(SMALL).named_modules()}
    load(state, layer_types=types)

    for path, kind in (("backbone.convolutions.1", "GELU"), ("backbone.convolutions.5", "AvgPool2d")):
        with pytest.raises(CheckpointError, match=f"{path} is {kind}, expected"):
            load(state, layer_types={**types, path: kind})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_shape": (2, 8)}, r"input_shape is \[2, 8\], expected channels, height and width"),
        ({"input_shape": (2, 8, 10)}, "the last two multiples of 4: 2 convolutions halve them"),
        ({"convolution_channels": ()}, "expected at least one"),
        ({"convolution_channels": (3, 0)}, "each at least 1"),
        ({"input_dim": 100}, "input_dim is 100, expected 128"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvolutionalTaskExpertConfig(**{**asdict(SMALL), "input_dim": 0, **changes})


def test_it_exports_with_trunk_and_tails_and_predicts_as_torch_does(tmp_path: Path) -> None:
    model = new_model(SMALL, seed=3).eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    x = torch.rand(5, 2, 8, 8, generator=torch.Generator().manual_seed(0))

    result = te_export.export(tmp_path / "model.pt")

    with te_runtime.load(result.bundle, provider="cpu", mode="split") as runtime:
        found = runtime.predict(x.numpy())
    for task in (0, 1):
        with torch.no_grad():
            prediction, aux = model(x, task)
        # Sums of at most 36 float32 terms below 1.
        np.testing.assert_allclose(found[f"task_{task}"].output, prediction.numpy(), atol=1e-6)
        np.testing.assert_allclose(
            found[f"task_{task}"].routing_weights, aux["gate_weights"].numpy(), atol=1e-6
        )

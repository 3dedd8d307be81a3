"""Where a file names the layers of a pickled module, they must be TaskExpert's."""

from __future__ import annotations

import pytest
from torch import nn

from te_export.errors import CheckpointError
from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel
from te_export.models.task_expert_layers import final_relu_of


def layer_types(final_relu: bool, **changes: str) -> dict[str, str]:
    """Module path to class name of a whole model, as a pickled module gives them."""
    config = TaskExpertConfig(
        input_dim=3,
        backbone_dim=2,
        expert_dim=2,
        num_experts=2,
        num_tasks=1,
        task_output_dims=(1,),
        final_relu=final_relu,
    )
    found = {path: type(module).__name__ for path, module in TaskExpertModel(config).named_modules()}
    for path in [path for path in found if path.endswith(".gate")]:
        found[f"{path}.3"] = "Softmax"  # some keep the softmax as a layer
    return found | {path.replace("__", "."): kind for path, kind in changes.items()}


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("in_config", [None, "same"])
def test_layers_tell_whether_relu_ends_the_networks(final_relu: bool, in_config: str | None) -> None:
    told = final_relu if in_config else None

    assert final_relu_of(layer_types(final_relu), told) is final_relu


@pytest.mark.parametrize("in_config", [None, False, True])
def test_without_layers_the_config_tells_and_else_there_is_none(in_config: bool | None) -> None:
    assert final_relu_of({}, in_config) is bool(in_config)


@pytest.mark.parametrize("in_layers", [False, True])
def test_layers_and_config_that_disagree_are_refused(in_layers: bool) -> None:
    with pytest.raises(CheckpointError, match=f"final_relu is {not in_layers} in the config"):
        final_relu_of(layer_types(in_layers), not in_layers)


def test_relu_at_the_end_of_some_networks_only_is_refused_with_their_names() -> None:
    types = layer_types(False) | {"experts.1.network.7": "ReLU"}

    with pytest.raises(CheckpointError, match=r"1 of 3 .* networks end with ReLU.*experts\.1\.network\.7"):
        final_relu_of(types, None)


@pytest.mark.parametrize(
    ("path", "kind", "expected"),
    [
        ("backbone.network.1", "GELU", "ReLU"),
        ("backbone.network.0", "LazyLinear", "Linear"),
        ("experts.0.network.4", "LeakyReLU", "ReLU"),
        ("experts.1.network.2", "BatchNorm1d", "no such layer"),
        ("experts.0.network.7", "Tanh", "ReLU"),
        ("experts.0.network.8", "Linear", "no such layer"),
        ("gating_networks.0.gate.1", "Tanh", "ReLU"),
        ("gating_networks.0.gate.3", "Sigmoid", "Softmax"),
        ("task_heads.0.head.1", "ELU", "ReLU"),
        ("task_heads.0.head.4", "Softmax", "no such layer"),
        ("experts.0.activation", "Tanh", "no such layer"),
        ("output_activation", "Sigmoid", "no such layer"),
    ],
)
def test_another_layer_in_a_place_is_refused_with_both(path: str, kind: str, expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        final_relu_of(layer_types(False) | {path: kind}, None)

    assert f"{path} is {kind}, expected {expected}" in str(caught.value)


def test_every_odd_layer_is_listed() -> None:
    types = layer_types(False) | {"backbone.network.1": "GELU", "task_heads.0.head.1": "ELU"}

    with pytest.raises(CheckpointError, match=r"(?s)backbone\.network\.1 is GELU.*task_heads\.0\.head\.1"):
        final_relu_of(types, None)


def test_identity_in_place_of_dropout_is_the_same_model() -> None:
    types = {
        path: "Identity" if kind == nn.Dropout.__name__ else kind for path, kind in layer_types(False).items()
    }

    assert "Dropout" not in types.values()
    assert final_relu_of(types, None) is False

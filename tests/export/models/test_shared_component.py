"""The shared-component model's arithmetic, against numpy in float64 written from its definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from te_export.models.shared_component import FixedRouting, SharedComponentConfig, SharedComponentModel
from te_export.models.shared_component_training import new_model

Array = NDArray[np.float64]

SMALL = SharedComponentConfig(
    image_shape=(2, 8, 12),
    component_kinds=("convolutional", "dense", "profile"),
    component_widths=(3, 5, 4),
    feature_dim=6,
    gate_dim=7,
    task_names=("digit", "box"),
    task_kinds=("classes", "box"),
    task_output_dims=(5, 4),
    routing_kinds=("learned", "fixed"),
)
DISTRIBUTION = (0.5, 0.2, 0.3)


def small_model() -> SharedComponentModel:
    """SMALL in float64, the second task's routing fixed."""
    model = new_model(SMALL, seed=1).double().eval()
    model.fix_routing("box", DISTRIBUTION)
    return model


def images(rows: int, config: SharedComponentConfig = SMALL, seed: int = 0) -> torch.Tensor:
    """(rows, C, H, W) float64, 0 to 1."""
    return torch.from_numpy(np.random.default_rng(seed).random((rows, *config.image_shape)))


def relu(x: Array) -> Array:
    return np.maximum(x, 0.0)


def convolved(x: Array, weight: Array, bias: Array) -> Array:
    """3 x 3 cross-correlation over an image with a border of zeros: (B, C, H, W) → (B, out, H, W)."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))  # (B, C, H, W, 3, 3)
    result: Array = np.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]
    return result


def halved(x: Array) -> Array:
    """The largest of every 2 x 2 values."""
    rows, channels, height, width = x.shape
    largest: Array = x.reshape(rows, channels, height // 2, 2, width // 2, 2).max(axis=(3, 5))
    return largest


class Reference:
    """The model in numpy."""

    def __init__(self, model: SharedComponentModel) -> None:
        self.state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def linear(self, name: str, x: Array) -> Array:
        result: Array = x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]
        return result

    def features(self, x: Array) -> list[Array]:
        value = x
        for layer in (0, 3):
            name = f"components.0.convolutional.{layer}"
            value = halved(relu(convolved(value, self.state[f"{name}.weight"], self.state[f"{name}.bias"])))
        convolutional = relu(self.linear("components.0.convolutional.7", value.reshape(len(x), -1)))
        hidden = relu(self.linear("components.1.dense.1", x.reshape(len(x), -1)))
        dense = relu(self.linear("components.1.dense.3", hidden))
        profiles = [np.concatenate([x[:, c].mean(axis=2), x[:, c].mean(axis=1)], axis=1) for c in (0, 1)]
        hidden = relu(self.linear("components.2.profile.0", np.concatenate(profiles, axis=1)))
        profile = relu(self.linear("components.2.profile.2", hidden))
        return [convolutional, dense, profile]

    def learned(self, x: Array, task: int) -> Array:
        rows, channels, height, width = x.shape
        cells = x.reshape(rows, channels, 4, height // 4, 4, width // 4).mean(axis=(3, 5)).reshape(rows, -1)
        hidden = relu(self.linear(f"routing.{task}.gate.0", cells))
        powers = np.exp(self.linear(f"routing.{task}.gate.2", hidden))
        weights: Array = powers / powers.sum(axis=1, keepdims=True)
        return weights


def test_forward_is_the_head_of_the_mixture_in_float64() -> None:
    model, x = small_model(), images(9)
    reference = Reference(model)
    features = reference.features(x.numpy())

    with torch.no_grad():
        found = model(x)

    assert list(found) == ["digit", "box"]
    weights = {"digit": reference.learned(x.numpy(), 0), "box": np.tile(DISTRIBUTION, (9, 1))}
    for task, name in enumerate(found):
        mixed = sum(weights[name][:, j : j + 1] * features[j] for j in range(3))
        expected = reference.linear(f"heads.{task}", mixed)
        # float64 sums of at most 192 terms of size 1 in another order.
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-12, atol=1e-13)


def test_terms_are_the_weights_and_the_head_of_each_component_alone() -> None:
    model, x = small_model(), images(4)
    reference = Reference(model)
    features = reference.features(x.numpy())

    with torch.no_grad():
        terms = model.forward_with_terms(x)
        predictions = model(x)

    for task, (name, found) in enumerate(terms.items()):
        assert torch.equal(found.prediction, predictions[name])
        for j in range(3):
            expected = reference.linear(f"heads.{task}", features[j])
            np.testing.assert_allclose(
                found.component_predictions[:, j].numpy(), expected, rtol=1e-12, atol=1e-13
            )
    np.testing.assert_allclose(
        terms["digit"].routing_weights.numpy(), reference.learned(x.numpy(), 0), rtol=1e-13
    )
    np.testing.assert_allclose(
        terms["box"].routing_weights.numpy(), np.tile(DISTRIBUTION, (4, 1)), rtol=1e-15
    )


def test_the_prediction_is_the_mean_of_the_components_own_predictions() -> None:
    with torch.no_grad():
        terms = small_model().forward_with_terms(images(6))

    for found in terms.values():
        mean = (found.routing_weights.unsqueeze(-1) * found.component_predictions).sum(dim=1)
        torch.testing.assert_close(found.prediction, mean, rtol=1e-12, atol=1e-14)


@st.composite
def configs(draw: st.DrawFn) -> SharedComponentConfig:
    kinds = draw(st.lists(st.sampled_from(["convolutional", "dense", "profile"]), min_size=1, max_size=4))
    tasks = draw(st.integers(1, 3))
    return SharedComponentConfig(
        image_shape=(draw(st.integers(1, 4)), 4 * draw(st.integers(1, 3)), 4 * draw(st.integers(1, 3))),
        component_kinds=tuple(kinds),
        component_widths=tuple(draw(st.integers(1, 6)) for _ in kinds),
        feature_dim=draw(st.integers(1, 8)),
        gate_dim=draw(st.integers(1, 6)),
        task_names=tuple(f"task_{task}" for task in range(tasks)),
        task_kinds=tuple(draw(st.sampled_from(["classes", "box"])) for _ in range(tasks)),
        task_output_dims=tuple(draw(st.integers(1, 6)) for _ in range(tasks)),
        routing_kinds=tuple(draw(st.sampled_from(["learned", "fixed"])) for _ in range(tasks)),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(config=configs(), rows=st.integers(1, 5))
def test_every_config_gives_a_prediction_and_weights_summing_to_one_per_row(
    config: SharedComponentConfig, rows: int
) -> None:
    model = new_model(config, seed=0)
    with torch.no_grad():
        terms = model.forward_with_terms(images(rows, config).float())

    components = len(config.component_kinds)
    for (name, found), size in zip(terms.items(), config.task_output_dims, strict=True):
        assert found.prediction.shape == (rows, size), name
        assert found.component_predictions.shape == (rows, components, size)
        assert found.routing_weights.shape == (rows, components)
        assert bool((found.routing_weights >= 0).all())
        # Each of at most 4 float32 weights is within 2^-24 of its own size.
        torch.testing.assert_close(found.routing_weights.sum(dim=1), torch.ones(rows), rtol=0, atol=1e-6)


def test_names_are_those_the_module_documents() -> None:
    found = {name: list(tensor.shape) for name, tensor in small_model().state_dict().items()}

    expected = {
        "components.0.convolutional.0.weight": [3, 2, 3, 3],
        "components.0.convolutional.3.weight": [6, 3, 3, 3],
        "components.0.convolutional.7.weight": [6, 6 * 2 * 3],
        "components.1.dense.1.weight": [5, 2 * 8 * 12],
        "components.1.dense.3.weight": [6, 5],
        "components.2.profile.0.weight": [4, 2 * (8 + 12)],
        "components.2.profile.2.weight": [6, 4],
        "routing.0.gate.0.weight": [7, 32],
        "routing.0.gate.2.weight": [3, 7],
        "heads.0.weight": [5, 6],
        "heads.1.weight": [4, 6],
    }
    biases = {name.replace("weight", "bias"): shape[:1] for name, shape in expected.items()}
    assert found == {**expected, **biases, "routing.1.logits": [3]}


def test_a_fixed_distribution_is_even_until_set_and_no_training_changes_it() -> None:
    model = new_model(SMALL, seed=0)
    routing = model.routing[1]

    assert torch.equal(routing(torch.zeros(2, 2, 8, 12)), torch.full((2, 3), 1 / 3))
    assert "routing.1.logits" not in dict(model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_probability_zero_is_exactly_zero_in_every_float_type(dtype: torch.dtype) -> None:
    routing = FixedRouting(3)
    routing.set_distribution([0.0, 1.0, 0.0])

    weights = routing.to(dtype)(torch.zeros(2, 1))

    assert torch.equal(weights, torch.tensor([[0.0, 1.0, 0.0]] * 2, dtype=dtype))
    assert bool(routing.logits.isfinite().all())


@pytest.mark.parametrize("wrong", [(0.5, 0.5), (0.5, 0.6, 0.1), (1.5, -0.5, 0.0), (float("nan"), 0.5, 0.5)])
def test_what_is_no_distribution_is_refused(wrong: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="is no distribution over 3 components"):
        new_model(SMALL, seed=0).fix_routing("box", wrong)


def test_only_a_fixed_routing_takes_a_distribution() -> None:
    model = new_model(SMALL, seed=0)

    with pytest.raises(ValueError, match="routing of task 'digit' is learned"):
        model.fix_routing("digit", DISTRIBUTION)
    with pytest.raises(ValueError, match="no task 'boxes', expected one of digit, box"):
        model.fix_routing("boxes", DISTRIBUTION)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_shape": (3, 30, 32)}, r"image_shape is \[3, 30, 32\], expected .* multiples of 4"),
        ({"image_shape": (3, 32)}, r"image_shape is \[3, 32\]"),
        ({"component_widths": (3, 5)}, "component_widths has 2 entries, expected 3: one per component"),
        ({"task_kinds": ("classes",)}, "task_kinds has 1 entries, expected 2: one per task"),
        ({"component_kinds": ("convolutional", "dense", "linear")}, "component_kinds holds 'linear'"),
        ({"routing_kinds": ("learned", "random")}, "routing_kinds holds 'random', expected one of learned"),
        ({"feature_dim": 0}, "feature_dim holds 0, expected at least 1"),
        ({"component_kinds": (), "component_widths": ()}, "at least one component and one task"),
        ({"task_names": ("a", "a")}, "task_names has a name twice"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)  # type: ignore[arg-type]

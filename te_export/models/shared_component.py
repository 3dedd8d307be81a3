"""Shared-component MoE: components of different kinds are shared by all tasks; each task mixes them.

    x (B, C, H, W), values 0 to 1
    component j: F_j(x) (B, F);  e = stack(F_j) (B, K, F)
    task t:      P_t(x) (B, K), rows summing to 1;  f_t = Σ_j P_t,j · F_j(x) (B, F)
                 prediction = head_t(f_t) (B, out_t), head_t affine

B batch, K components, F feature_dim.

Component j's own prediction, from which its loss L_j is computed, is task t's head applied to F_j(x) alone. Heads
are affine and the rows of P_t sum to 1, so the prediction is exactly Σ_j P_t,j · head_t(F_j(x)), the mean of the
components' own predictions. By Jensen's inequality the loss of the prediction is then at most Σ_j P_t,j · L_j, the
loss that is trained, wherever the loss is convex in the prediction.

Parameter names, which checkpoints rely on (the kind of a component and of a routing is part of its names):

    components.{j}.convolutional.{0,3,7}   3 x 3 convolutions C → width → 2·width, each ReLU and 2 x 2 max pooling;
                                           then Linear(2·width·H/4·W/4, F) ReLU
    components.{j}.dense.{1,3}             Linear(C·H·W, width) ReLU Linear(width, F) ReLU
    components.{j}.profile.{0,2}           the mean of every image row and column of each channel, C·(H + W) values;
                                           Linear(C·(H + W), width) ReLU Linear(width, F) ReLU
    routing.{t}.gate.{0,2}                 learned: the image averaged to 4 x 4; Linear(16·C, gate_dim) ReLU
                                           Linear(gate_dim, K) softmax
    routing.{t}.logits                     fixed: a buffer (K,) whose softmax is the distribution of every row
    heads.{t}                              Linear(F, out_t)

All but image_shape and the kinds of the tasks can be read off names and shapes; task kinds say which loss is trained,
and change no prediction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "ComponentKind",
    "FixedRouting",
    "LearnedRouting",
    "RoutingKind",
    "SharedComponentConfig",
    "SharedComponentModel",
    "TaskKind",
    "TaskTerms",
]

ComponentKind = Literal["convolutional", "dense", "profile"]
RoutingKind = Literal["learned", "fixed"]
TaskKind = Literal["classes", "box"]

GATE_CELLS = 4
"""A learned routing reads the image averaged to this many rows and columns."""
NO_WEIGHT_LOGIT = -1e4
"""Stands for probability 0 in a fixed distribution: its exponential is 0 in every float type, and it is finite."""


@dataclass(frozen=True)
class SharedComponentConfig:
    """Sizes and kinds of a shared-component model, and the settings it is trained with.

    Attributes:
        image_shape: (C, H, W); H and W are multiples of 4.
        component_kinds: one per component.
        component_widths: one per component: channels of the first convolution, or units of the hidden layer.
        task_kinds: `classes` (class indices, cross-entropy) or `box` (real numbers, absolute error).
        routing_kinds: one per task.
    """

    image_shape: tuple[int, ...] = (3, 32, 32)
    component_kinds: tuple[ComponentKind, ...] = ("convolutional", "dense")
    component_widths: tuple[int, ...] = (16, 64)
    feature_dim: int = 64
    gate_dim: int = 32
    task_names: tuple[str, ...] = ("class", "box")
    task_kinds: tuple[TaskKind, ...] = ("classes", "box")
    task_output_dims: tuple[int, ...] = (10, 4)
    routing_kinds: tuple[RoutingKind, ...] = ("learned", "learned")
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        for name in (
            "image_shape",
            "component_kinds",
            "component_widths",
            "task_names",
            "task_kinds",
            "task_output_dims",
            "routing_kinds",
        ):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_image_shape()
        self._check_counts()
        self._check_kinds()
        sizes: dict[str, tuple[int, ...]] = {"feature_dim": (self.feature_dim,), "gate_dim": (self.gate_dim,)}
        sizes |= {"component_widths": self.component_widths, "task_output_dims": self.task_output_dims}
        for name, values in sizes.items():
            if min(values) < 1:
                raise ValueError(f"{name} holds {min(values)}, expected at least 1")

    def _check_image_shape(self) -> None:
        shape = self.image_shape
        if len(shape) != 3 or min(shape) < 1 or shape[1] % GATE_CELLS or shape[2] % GATE_CELLS:
            raise ValueError(
                f"image_shape is {list(shape)}, expected channels, height and width, the last two multiples of "
                f"{GATE_CELLS}"
            )

    def _check_counts(self) -> None:
        if not self.component_kinds or not self.task_names:
            raise ValueError("expected at least one component and one task")
        counts = {
            "component_widths": (len(self.component_widths), len(self.component_kinds), "component"),
            "task_kinds": (len(self.task_kinds), len(self.task_names), "task"),
            "task_output_dims": (len(self.task_output_dims), len(self.task_names), "task"),
            "routing_kinds": (len(self.routing_kinds), len(self.task_names), "task"),
        }
        for name, (found, expected, each) in counts.items():
            if found != expected:
                raise ValueError(f"{name} has {found} entries, expected {expected}: one per {each}")
        if len(set(self.task_names)) != len(self.task_names):
            raise ValueError(f"task_names has a name twice: {', '.join(self.task_names)}")

    def _check_kinds(self) -> None:
        allowed = {"component_kinds": ComponentKind, "task_kinds": TaskKind, "routing_kinds": RoutingKind}
        for name, kinds in allowed.items():
            for kind in getattr(self, name):
                if kind not in get_args(kinds):
                    raise ValueError(f"{name} holds {kind!r}, expected one of {', '.join(get_args(kinds))}")


class TaskTerms(NamedTuple):
    """Everything one task's loss is made of."""

    prediction: Tensor  # (B, out)
    routing_weights: Tensor  # (B, K)
    component_predictions: Tensor  # (B, K, out): the head applied to each component's features alone


class Flattened(nn.Module):
    """(B, …) → (B, width), row-major; the batch axis is inferred."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.width)


class ConvolutionalComponent(nn.Module):
    """(B, C, H, W) → (B, F), by two convolutions."""

    def __init__(self, image_shape: tuple[int, ...], width: int, feature_dim: int) -> None:
        super().__init__()
        channels, height, columns = image_shape
        flat = 2 * width * (height // 4) * (columns // 4)
        self.convolutional = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            Flattened(flat),
            nn.Linear(flat, feature_dim),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.convolutional(x)
        return features


class DenseComponent(nn.Module):
    """(B, C, H, W) → (B, F), every value joined to every hidden unit."""

    def __init__(self, image_shape: tuple[int, ...], width: int, feature_dim: int) -> None:
        super().__init__()
        flat = math.prod(image_shape)
        self.dense = nn.Sequential(
            Flattened(flat),
            nn.Linear(flat, width),
            nn.ReLU(),
            nn.Linear(width, feature_dim),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.dense(x)
        return features


class ProfileComponent(nn.Module):
    """(B, C, H, W) → (B, F), from the means of image rows and columns: cheap, and good at where things are."""

    def __init__(self, image_shape: tuple[int, ...], width: int, feature_dim: int) -> None:
        super().__init__()
        channels, height, columns = image_shape
        self.flat = channels * (height + columns)
        self.profile = nn.Sequential(
            nn.Linear(self.flat, width), nn.ReLU(), nn.Linear(width, feature_dim), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        means = torch.cat([x.mean(dim=3), x.mean(dim=2)], dim=2)  # (B, C, H) and (B, C, W) → (B, C, H + W)
        features: Tensor = self.profile(means.reshape(-1, self.flat))
        return features


class LearnedRouting(nn.Module):
    """(B, C, H, W) → routing weights (B, K), each row summing to 1."""

    def __init__(self, image_shape: tuple[int, ...], gate_dim: int, num_components: int) -> None:
        super().__init__()
        channels, height, columns = image_shape
        self.cell = (height // GATE_CELLS, columns // GATE_CELLS)
        self.flat = channels * GATE_CELLS**2
        self.gate = nn.Sequential(
            nn.Linear(self.flat, gate_dim), nn.ReLU(), nn.Linear(gate_dim, num_components)
        )

    def forward(self, x: Tensor) -> Tensor:
        cells = functional.avg_pool2d(x, self.cell)  # (B, C, H, W) → (B, C, 4, 4)
        return torch.softmax(self.gate(cells.reshape(-1, self.flat)), dim=-1)


class FixedRouting(nn.Module):
    """The same distribution for every row: (B, …) → (B, K). A buffer: no training changes it."""

    logits: Tensor

    def __init__(self, num_components: int) -> None:
        super().__init__()
        self.register_buffer("logits", torch.zeros(num_components))  # even

    def set_distribution(self, probabilities: Sequence[float]) -> None:
        """Takes K probabilities.

        Raises:
            ValueError: not K of them, one is negative, or they do not sum to 1 (within 1e-6).
        """
        expected = self.logits.numel()
        sound = len(probabilities) == expected and all(p >= 0.0 for p in probabilities)
        if not sound or abs(math.fsum(probabilities) - 1.0) > 1e-6:
            raise ValueError(
                f"{list(probabilities)} is no distribution over {expected} components: expected {expected} "
                "numbers of at least 0 that sum to 1"
            )
        logits = [math.log(p) if p > 0.0 else NO_WEIGHT_LOGIT for p in probabilities]
        self.logits.copy_(torch.tensor(logits, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.logits.expand(x.shape[0], self.logits.shape[0])  # (K,) → (B, K)
        return torch.softmax(logits, dim=-1)


_COMPONENTS: dict[ComponentKind, type[ConvolutionalComponent | DenseComponent | ProfileComponent]] = {
    "convolutional": ConvolutionalComponent,
    "dense": DenseComponent,
    "profile": ProfileComponent,
}


class SharedComponentModel(nn.Module):
    """The whole model."""

    def __init__(self, config: SharedComponentConfig) -> None:
        super().__init__()
        self.config = config
        shape, count = config.image_shape, len(config.component_kinds)
        self.components = nn.ModuleList(
            _COMPONENTS[kind](shape, width, config.feature_dim)
            for kind, width in zip(config.component_kinds, config.component_widths, strict=True)
        )
        self.routing = nn.ModuleList(
            LearnedRouting(shape, config.gate_dim, count) if kind == "learned" else FixedRouting(count)
            for kind in config.routing_kinds
        )
        self.heads = nn.ModuleList(nn.Linear(config.feature_dim, size) for size in config.task_output_dims)

    def fix_routing(self, task: str, probabilities: Sequence[float]) -> None:
        """Sets the distribution of a task whose routing is fixed; it is even until then.

        Raises:
            ValueError: there is no such task, its routing is learned, or that is no distribution.
        """
        if task not in self.config.task_names:
            raise ValueError(f"no task {task!r}, expected one of {', '.join(self.config.task_names)}")
        routing = self.routing[self.config.task_names.index(task)]
        if not isinstance(routing, FixedRouting):
            raise ValueError(f"the routing of task {task!r} is learned; only a fixed one has a distribution")
        routing.set_distribution(probabilities)

    def component_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) → every component's features (B, K, F)."""
        return torch.stack([component(x) for component in self.components], dim=1)

    def mix(self, x: Tensor, features: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """Images and component features (B, K, F) → prediction (B, out), routing weights (B, K)."""
        weights: Tensor = self.routing[task](x)
        mixed = (weights.unsqueeze(-1) * features).sum(dim=1)  # (B, K, 1) · (B, K, F) → (B, F)
        return self.heads[task](mixed), weights

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W), values 0 to 1 → {task: prediction (B, out)}."""
        features = self.component_features(x)
        return {name: self.mix(x, features, task)[0] for task, name in enumerate(self.config.task_names)}

    def forward_with_terms(self, x: Tensor) -> dict[str, TaskTerms]:
        """The same predictions, with routing weights and the components' own predictions."""
        features = self.component_features(x)
        terms = {}
        for task, name in enumerate(self.config.task_names):
            prediction, weights = self.mix(x, features, task)
            terms[name] = TaskTerms(prediction, weights, self.heads[task](features))
        return terms

"""TaskExpert: one backbone, K experts, and per task a gate that mixes the experts and a head.

Parameter names and arithmetic of the linear model are fixed by checkpoints in the wild; a convolutional backbone for
images, which is ours, has names of its own. B batch, K experts, T tasks, D features.

    x (B, input_dim) or (B, C, H, W) → backbone → h (B, backbone_dim)
    expert i: h → e_i (B, expert_dim);  e = stack(e_i) (B, K, expert_dim)
    task t:   w = softmax(gate(flatten(e))) (B, K);  f = Σ_i w_i · e_i (B, expert_dim);  prediction =
        head(f) (B, out_t)

`feature_fusion` is in every checkpoint and used by no prediction; it is kept so that state dicts load
unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypedDict

import torch
from torch import Tensor, nn

__all__ = ["ConvolutionalTaskExpertConfig", "TaskExpertAux", "TaskExpertConfig", "TaskExpertModel"]


@dataclass(frozen=True)
class TaskExpertConfig:
    """Sizes of a TaskExpert model, and the settings it was trained with.

    Attributes:
        final_relu: whether ReLU also follows the last layer of the backbone and of every expert. Parameter
            shapes are the same either way, so only a config can say so.
    """

    input_dim: int = 784
    backbone_dim: int = 512
    expert_dim: int = 128
    num_experts: int = 8
    num_tasks: int = 5
    task_output_dims: tuple[int, ...] = (10, 10, 10, 10, 10)
    dropout: float = 0.1
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    final_relu: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_output_dims", tuple(self.task_output_dims))
        sizes = {
            "input_dim": self.input_dim,
            "backbone_dim": self.backbone_dim,
            "num_experts": self.num_experts,
            "num_tasks": self.num_tasks,
            **{f"task_output_dims[{task}]": size for task, size in enumerate(self.task_output_dims)},
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}, expected at least 1")
        if self.expert_dim < 2:
            raise ValueError(f"expert_dim is {self.expert_dim}, expected at least 2: a head halves it")
        if len(self.task_output_dims) != self.num_tasks:
            raise ValueError(
                f"task_output_dims has {len(self.task_output_dims)} entries, num_tasks is "
                f"{self.num_tasks}: expected one per task"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}, expected 0 <= dropout < 1")

    @property
    def input_row_shape(self) -> tuple[int, ...]:
        """Shape of one row of the input."""
        return (self.input_dim,)


@dataclass(frozen=True)
class ConvolutionalTaskExpertConfig(TaskExpertConfig):
    """A TaskExpert whose backbone reads images.

    Attributes:
        input_dim: values of one image; follows from input_shape where it is 0.
        input_shape: (C, H, W); each convolution halves H and W, so both are multiples of 2 to their number.
        convolution_channels: channels after each convolution, at least one.
    """

    input_dim: int = 0
    input_shape: tuple[int, ...] = (3, 32, 32)
    convolution_channels: tuple[int, ...] = (16, 32)

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_shape", tuple(self.input_shape))
        object.__setattr__(self, "convolution_channels", tuple(self.convolution_channels))
        shape, channels = self.input_shape, self.convolution_channels
        if not channels or min(channels) < 1:
            raise ValueError(
                f"convolution_channels is {list(channels)}, expected at least one, each at least 1"
            )
        if len(shape) != 3 or min(shape) < 1 or any(side % 2 ** len(channels) for side in shape[1:]):
            raise ValueError(
                f"input_shape is {list(shape)}, expected channels, height and width, the last two multiples of "
                f"{2 ** len(channels)}: {len(channels)} convolutions halve them"
            )
        if self.input_dim not in (0, math.prod(shape)):
            raise ValueError(
                f"input_dim is {self.input_dim}, expected {math.prod(shape)}, the values of input_shape {list(shape)}"
            )
        object.__setattr__(self, "input_dim", math.prod(shape))
        super().__post_init__()

    @property
    def input_row_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.input_shape

    @property
    def convolution_multiply_adds(self) -> int:
        """Of one image: 9 for every pair of channels and every place."""
        sizes = (self.input_shape[0], *self.convolution_channels)
        _, height, width = self.input_shape
        return sum(
            9 * size_in * size_out * (height >> index) * (width >> index)
            for index, (size_in, size_out) in enumerate(pairwise(sizes))
        )

    @property
    def flat_dim(self) -> int:
        """Values that the convolutions leave of an image."""
        halvings = len(self.convolution_channels)
        height, width = (side >> halvings for side in self.input_shape[1:])
        return self.convolution_channels[-1] * height * width


class TaskExpertAux(TypedDict):
    """What TaskExpertModel.forward returns beside the prediction."""

    backbone_features: Tensor  # (B, backbone_dim)
    expert_features: Tensor  # (B, K, expert_dim)
    gate_weights: Tensor  # (B, K)
    task_specific_features: Tensor  # (B, expert_dim)


def _three_layers(sizes: tuple[int, int, int, int], config: TaskExpertConfig) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Linear(sizes[0], sizes[1]),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(sizes[1], sizes[2]),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(sizes[2], sizes[3]),
    ]
    if config.final_relu:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class BackboneNetwork(nn.Module):
    """(B, input_dim) → (B, backbone_dim)."""

    def __init__(self, config: TaskExpertConfig) -> None:
        super().__init__()
        width = config.backbone_dim
        self.network = _three_layers((config.input_dim, 2 * width, width, width), config)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.network(x)
        return features


class ConvolutionalBackbone(nn.Module):
    """(B, C, H, W) → (B, backbone_dim).

    Every convolution is 3 x 3 with a border of zeros, then ReLU and 2 x 2 max pooling; one linear layer follows, which
    keeps where things are. Parameters: convolutions.{0,3,6,…} and projection.
    """

    def __init__(self, config: ConvolutionalTaskExpertConfig) -> None:
        super().__init__()
        sizes = (config.input_shape[0], *config.convolution_channels)
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise(sizes):
            layers += [nn.Conv2d(size_in, size_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.convolutions = nn.Sequential(*layers)
        self.flat_dim = config.flat_dim
        self.dropout = nn.Dropout(config.dropout)
        self.projection = nn.Linear(config.flat_dim, config.backbone_dim)
        self.final_relu = config.final_relu

    def forward(self, x: Tensor) -> Tensor:
        flat = self.convolutions(x).reshape(-1, self.flat_dim)  # (B, channels, h, w) → (B, channels·h·w)
        features: Tensor = self.projection(self.dropout(flat))
        return torch.relu(features) if self.final_relu else features


class ExpertNetwork(nn.Module):
    """(B, backbone_dim) → (B, expert_dim)."""

    def __init__(self, config: TaskExpertConfig) -> None:
        super().__init__()
        width = config.expert_dim
        self.network = _three_layers((config.backbone_dim, 2 * width, width, width), config)

    def forward(self, h: Tensor) -> Tensor:
        features: Tensor = self.network(h)
        return features


class DynamicGatingNetwork(nn.Module):
    """Flattened expert features (B, K·expert_dim), row-major → routing weights (B, K), each row summing to
    1.
    """

    def __init__(self, config: TaskExpertConfig) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(config.num_experts * config.expert_dim, config.expert_dim),
            nn.ReLU(),
            nn.Linear(config.expert_dim, config.num_experts),
        )

    def forward(self, flat_features: Tensor) -> Tensor:
        return torch.softmax(self.gate(flat_features), dim=-1)  # (B, K·expert_dim) → (B, K)


class TaskSpecificHead(nn.Module):
    """(B, expert_dim) → (B, output_dim)."""

    def __init__(self, config: TaskExpertConfig, output_dim: int) -> None:
        super().__init__()
        width = config.expert_dim
        self.head = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(width // 2, output_dim),
        )

    def forward(self, fused: Tensor) -> Tensor:
        prediction: Tensor = self.head(fused)
        return prediction


class TaskExpertModel(nn.Module):
    """The whole model. `trunk` is shared by every task; `tail` is one task's gate, fusion and head."""

    def __init__(self, config: TaskExpertConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone: nn.Module = (
            ConvolutionalBackbone(config)
            if isinstance(config, ConvolutionalTaskExpertConfig)
            else BackboneNetwork(config)
        )
        self.experts = nn.ModuleList(ExpertNetwork(config) for _ in range(config.num_experts))
        self.gating_networks = nn.ModuleList(DynamicGatingNetwork(config) for _ in range(config.num_tasks))
        self.task_heads = nn.ModuleList(TaskSpecificHead(config, size) for size in config.task_output_dims)
        self.feature_fusion = nn.Sequential(
            nn.Linear(config.num_experts * config.expert_dim, config.expert_dim),
            nn.ReLU(),
            nn.Dropout(config.dropout),
        )

    def experts_of(self, h: Tensor) -> Tensor:
        """Backbone features (B, backbone_dim) → expert features (B, K, expert_dim)."""
        return torch.stack([expert(h) for expert in self.experts], dim=1)

    def trunk(self, x: Tensor) -> Tensor:
        """Input (B, input_dim) or (B, C, H, W) → expert features (B, K, expert_dim)."""
        return self.experts_of(self.backbone(x))

    def flatten(self, expert_features: Tensor) -> Tensor:
        """Expert features (B, K, D) → (B, K·D), row-major.

        The batch axis is left to reshape to infer: a size taken from x would tie every tail to the model's input.
        """
        return expert_features.reshape(-1, self.config.num_experts * self.config.expert_dim)

    def gate_and_fuse(
        self, expert_features: Tensor, flat_features: Tensor, task_id: int
    ) -> tuple[Tensor, Tensor]:
        """Expert features (B, K, D) and the same as (B, K·D) → routing weights (B, K), fused features (B,
        D).
        """
        weights = self.gating_networks[task_id](flat_features)
        fused = (weights.unsqueeze(-1) * expert_features).sum(dim=1)  # (B, K, 1) · (B, K, D) → (B, D)
        return weights, fused

    def tails(self, expert_features: Tensor, task_ids: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Expert features (B, K, D) → for each task asked for: prediction (B, out), routing weights (B,
        K).
        """
        flat_features = self.flatten(expert_features)  # once for all gates
        outputs = []
        for task_id in task_ids:
            weights, fused = self.gate_and_fuse(expert_features, flat_features, task_id)
            outputs.append((self.task_heads[task_id](fused), weights))
        return outputs

    def forward(self, x: Tensor, task_id: int) -> tuple[Tensor, TaskExpertAux]:
        """Prediction of one task (B, out_task), and the values it was made from."""
        h = self.backbone(x)
        expert_features = self.experts_of(h)
        weights, fused = self.gate_and_fuse(expert_features, self.flatten(expert_features), task_id)
        return self.task_heads[task_id](fused), {
            "backbone_features": h,
            "expert_features": expert_features,
            "gate_weights": weights,
            "task_specific_features": fused,
        }

    @torch.no_grad()
    def get_expert_utilization(self, x: Tensor, task_ids: Sequence[int]) -> Mapping[str, list[float]]:
        """Mean routing weight of each expert over the rows of x, as `{"task_0": [K floats], …}`."""
        flat_features = self.flatten(self.trunk(x))
        return {
            f"task_{task}": self.gating_networks[task](flat_features).mean(dim=0).tolist()
            for task in task_ids
        }

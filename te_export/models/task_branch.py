"""Task-branch MoE: one branch per task over a shared weight matrix W, and a weighted sum of their predictions.

    x (B, D) raw → z = (x - mean) / scale (B, D)
    h = tanh(z Wᵀ + b) (B, H), shared by all branches
    branch i:  ŷ_i = f_i(h) (B, O), f_i = Linear(H, branch_dim) ReLU Linear(branch_dim, O)
    aggregate: y = Σ_i β_i · ŷ_i (B, O), β = softmax(logits), positive and summing to 1

B batch, D input_dim, H shared_dim, O output_dim; a sum needs every branch to predict as many numbers.

mean and scale are buffers, so a graph of the model takes raw inputs and standardizes them itself.

Parameter names, which checkpoints rely on:

    standardize.{mean,scale}            (D,), buffers
    shared.{weight,bias}                W (H, D) and b (H,)
    branches.{i}.{0,2}.{weight,bias}    f_i
    task_weights.logits                 (T,)

Every size can be read off the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["AGGREGATE", "TaskBranchConfig", "TaskBranchModel"]

AGGREGATE = "aggregate"
"""The output that is the weighted sum; no task may have this name."""


@dataclass(frozen=True)
class TaskBranchConfig:
    """Sizes of a task-branch model, and the settings it is trained with.

    Attributes:
        output_dim: numbers that every branch, and so the aggregate, predicts.
        task_names: one per branch; `aggregate` is not allowed.
    """

    input_dim: int
    shared_dim: int = 32
    branch_dim: int = 16
    output_dim: int = 1
    task_names: tuple[str, ...] = ("task_0", "task_1")
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_names", tuple(self.task_names))
        for name in ("input_dim", "shared_dim", "branch_dim", "output_dim"):
            size = getattr(self, name)
            if size < 1:
                raise ValueError(f"{name} is {size}, expected at least 1")
        if not self.task_names or len(set(self.task_names)) != len(self.task_names):
            raise ValueError(f"task_names is {list(self.task_names)}, expected at least one name, each once")
        if any(name.lower() == AGGREGATE for name in self.task_names):
            raise ValueError(f"a task is named {AGGREGATE!r}, the name of the weighted sum; give it another")


class Standardize(nn.Module):
    """(B, D) → (x - mean) / scale; changes nothing until the mean and scale of data are set."""

    mean: Tensor
    scale: Tensor

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("scale", torch.ones(input_dim))

    @torch.no_grad()
    def set_from(self, x: Tensor) -> None:
        """Takes mean and standard deviation (over N, not N - 1) of rows (N, D); 1 where a column is constant.

        Raises:
            ValueError: no row, another number of columns, or a value that is not finite.
        """
        width = self.mean.numel()
        if x.ndim != 2 or x.shape[1] != width or len(x) == 0 or not bool(x.isfinite().all()):
            raise ValueError(
                f"rows of shape {list(x.shape)}, expected at least one of {width} finite values to take mean and "
                "scale from"
            )
        wide = x.double()
        deviation = wide.std(dim=0, correction=0)
        self.mean.copy_(wide.mean(dim=0))
        # A constant column's mean is rounded, so its deviation may be some 1e-16 of its size instead of 0.
        is_constant = deviation <= 1e-12 * wide.abs().amax(dim=0)
        self.scale.copy_(torch.where(is_constant, 1.0, deviation))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


class TaskWeights(nn.Module):
    """β, the share of every branch in the aggregate: predictions (B, T, O) → (B, T), the same in every row."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_tasks))  # even

    def forward(self, predictions: Tensor) -> Tensor:
        logits = self.logits.expand(predictions.shape[0], self.logits.shape[0])  # (T,) → (B, T)
        return torch.softmax(logits, dim=-1)


class TaskBranchModel(nn.Module):
    """The whole model."""

    def __init__(self, config: TaskBranchConfig) -> None:
        super().__init__()
        self.config = config
        self.standardize = Standardize(config.input_dim)
        self.shared = nn.Linear(config.input_dim, config.shared_dim)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Linear(config.shared_dim, config.branch_dim),
                nn.ReLU(),
                nn.Linear(config.branch_dim, config.output_dim),
            )
            for _ in config.task_names
        )
        self.task_weights = TaskWeights(len(config.task_names))

    @property
    def output_names(self) -> tuple[str, ...]:
        """The tasks, then the aggregate."""
        return (*self.config.task_names, AGGREGATE)

    def encode(self, z: Tensor) -> Tensor:
        """Standardized inputs (B, D) → shared features (B, H)."""
        return torch.tanh(self.shared(z))

    def aggregate(self, predictions: Sequence[Tensor]) -> Tensor:
        """Every branch's prediction (B, O) → their weighted sum (B, O)."""
        stacked = torch.stack(list(predictions), dim=1)  # T of (B, O) → (B, T, O)
        weights: Tensor = self.task_weights(stacked)
        return (weights.unsqueeze(-1) * stacked).sum(dim=1)  # (B, T, 1) · (B, T, O) → (B, O)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Raw inputs (B, D) → {task: ŷ_i (B, O), …, "aggregate": y (B, O)}."""
        h = self.encode(self.standardize(x))
        predictions = [branch(h) for branch in self.branches]
        return dict(zip(self.output_names, [*predictions, self.aggregate(predictions)], strict=True))

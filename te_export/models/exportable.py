"""A model ready to be captured: what every stage after the checkpoint knows of it, whatever its family."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["ExportableModel", "TaskOutput"]


@dataclass(frozen=True)
class TaskOutput:
    """One task: its name, the width of its prediction, and the parameters that must reach the prediction."""

    name: str
    output_dim: int
    tail_parameters: frozenset[str]


@dataclass(frozen=True)
class ExportableModel:
    """A torch module in eval mode on the CPU in float32, with all tasks of the export behind one forward.

    Attributes:
        module: forward(x (B, input_dim) float32) → (expert features (B, K, D), then for each task
            prediction (B, out) and routing weights (B, K)). Parameter names are those of the checkpoint
            behind the prefix `model.`.
        trunk_parameters: parameters that must reach the expert features, and through them every prediction.
        unused_parameters: in the checkpoint, and read by no task of this export.
    """

    family: str
    config: dict[str, bool | int | float | str | tuple[int, ...]]
    module: nn.Module
    input_name: str
    input_dim: int
    num_experts: int
    expert_dim: int
    tasks: tuple[TaskOutput, ...]
    trunk_parameters: frozenset[str]
    unused_parameters: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def used_parameters(self) -> frozenset[str]:
        """Every parameter that some exported graph needs."""
        return self.trunk_parameters.union(*(task.tail_parameters for task in self.tasks))

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the used parameters in float32."""
        return self.bytes_of(self.used_parameters)

    def bytes_of(self, names: Collection[str]) -> int:
        """Bytes of the named parameters in float32."""
        state = self.module.state_dict()
        return sum(state[f"model.{name}"].numel() * 4 for name in names)

    def example_rows(self, rows: int) -> Tensor:
        """Zeros (rows, input_dim) float32, for tracing."""
        return torch.zeros(rows, self.input_dim, dtype=torch.float32)

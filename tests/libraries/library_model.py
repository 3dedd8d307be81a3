"""What the checks know of a published library's model, whichever library it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = ["Inputs", "LibraryModel", "as_if_trained"]

EXAMPLE_ROWS = 5
Inputs = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class LibraryModel:
    """A small model of a library, ready to export.

    Attributes:
        module: in eval mode, float32, with weights as if trained.
        make_rows: of a number of rows and a seed, the way the library's own trainer calls the module.
        task_names: in the order of the outputs.
        gates: for each task that has one, the name of the submodule whose output is its routing weights
            (B, K); for a stack of gates, the last one's.
        optional_gates: tasks with a weighted sum that may be taken for a gate or not, and how many it weighs.
        fused_output: the module's output is one tensor (B, T) with a column per task.
        needs_whole_model: tasks whose prediction takes every parameter.
        spare_numbers: of a task graph over what torch's own export holds for the task: sizes that a Reshape reads.
    """

    module: nn.Module
    make_rows: Callable[[int, int], Inputs]
    task_names: tuple[str, ...]
    gates: Mapping[str, str] = field(default_factory=dict)
    optional_gates: Mapping[str, int] = field(default_factory=dict)
    fused_output: bool = False
    needs_whole_model: frozenset[str] = frozenset()
    spare_numbers: int = 0

    @property
    def example_inputs(self) -> Inputs:
        return self.make_rows(EXAMPLE_ROWS, 0)


def as_if_trained(module: nn.Module, seed: int) -> nn.Module:
    """The module in eval mode with running statistics, affine parameters and embeddings that are not the
    trivial ones a module starts from: a graph that dropped them would be told from one that did not."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                assert part.running_mean is not None
                assert part.running_var is not None
                part.running_mean.copy_(uniform(part.running_mean, -0.3, 0.3))
                part.running_var.copy_(uniform(part.running_var, 0.5, 1.5))
            elif isinstance(part, nn.Embedding):
                part.weight.copy_(uniform(part.weight, -1.0, 1.0))
        for parameter in module.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(uniform(parameter, -0.3, 0.3))
    return module.eval()

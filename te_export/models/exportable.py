"""A model ready to be captured: what every stage after the checkpoint knows of it, whatever its family."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn
from torch.export import ExportedProgram

from te_export.capture.joint_graph import EXPERT_FEATURES, prediction_name, routing_weights_name
from te_export.models.input_rows import InputRows
from te_runtime.manifest import DType

if TYPE_CHECKING:
    from te_export.modules.all_tasks import AllTasks

__all__ = ["ExpertFeatures", "ExportableModel", "ModelInput", "TaskOutput"]


@dataclass(frozen=True)
class ModelInput:
    """One input of the model.

    Attributes:
        shape: of one row, without the batch axis.
        examples: (N, …) rows that the model is known to accept, to draw probe rows from; None where any float
            will do.
        below: integers from 0 to below this one are accepted everywhere: the rows of the embedding that reads
            them; None where only the examples tell.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    examples: np.ndarray[tuple[int, ...], np.dtype[np.generic]] | None = None
    below: int | None = None

    @property
    def is_float(self) -> bool:
        return self.dtype == "float32"

    @property
    def size(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TaskOutput:
    """One task.

    Attributes:
        output_shape: of one row's prediction.
        num_experts: how many experts its routing weights are over; None where it has no gate.
        tail_parameters: those that must reach the prediction beside those of the trunk.
    """

    name: str
    output_shape: tuple[int, ...]
    num_experts: int | None
    tail_parameters: frozenset[str]

    @property
    def output_dim(self) -> int:
        """Elements of one row's prediction."""
        return math.prod(self.output_shape)


@dataclass(frozen=True)
class ExpertFeatures:
    """What the experts of a TaskExpert model give, the one value between its trunk and every tail: (B, K, D)."""

    num_experts: int
    expert_dim: int


@dataclass(frozen=True)
class ExportableModel:
    """A torch module in eval mode on the CPU in float32, with all tasks of the export behind one forward.

    Attributes:
        module: forward(one tensor (B, …) per input) → a tensor per name in `output_names`. Parameter names are
            those of the checkpoint behind `parameter_prefix`.
        expert_features: where the family has one value between trunk and tails; None where trunk and tails are
            found in the graph.
        trunk_parameters: parameters that must reach every prediction.
        unused_parameters: in the checkpoint, and read by no task of this export.
        program: the module as torch.export gives it, where it was traced already.
        multiply_adds: of one row, where that is more than one for each parameter, as in convolutions; else 0.
        parameter_sizes: elements of each parameter.
        needed: of a traced module: by output name, the parameters that the program has it depend on.
        sources: of a traced module: for parameters that are some rows of another, that other.
        eager: the module that was traced, as torch runs it untraced.
    """

    family: str
    config: dict[str, bool | int | float | str | tuple[int, ...]]
    module: nn.Module
    inputs: tuple[ModelInput, ...]
    tasks: tuple[TaskOutput, ...]
    expert_features: ExpertFeatures | None
    trunk_parameters: frozenset[str]
    unused_parameters: tuple[str, ...]
    notes: tuple[str, ...]
    parameter_prefix: str = "model."
    program: ExportedProgram | None = None
    multiply_adds: int = 0
    parameter_sizes: Mapping[str, int] = field(default_factory=dict)
    needed: Mapping[str, frozenset[str]] = field(default_factory=dict)
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    eager: AllTasks | None = None

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs of the module in order: expert features where it has them, then for each task its prediction,
        and its routing weights where it has a gate.
        """
        names = [] if self.expert_features is None else [EXPERT_FEATURES]
        for task in self.tasks:
            names.append(prediction_name(task.name))
            if task.num_experts is not None:
                names.append(routing_weights_name(task.name))
        return tuple(names)

    @property
    def used_parameters(self) -> frozenset[str]:
        """Every parameter that some exported graph needs."""
        return self.trunk_parameters.union(*(task.tail_parameters for task in self.tasks))

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the used parameters in float32."""
        return self.bytes_of(self.used_parameters)

    @property
    def row_cost_bytes(self) -> int:
        """What one row costs, in bytes of weights that a model of linear layers would read for it."""
        return max(self.parameter_bytes, 4 * self.multiply_adds)

    def bytes_of(self, names: Collection[str]) -> int:
        """Bytes of the named parameters in float32."""
        return sum(4 * self.parameter_sizes[name] for name in names)

    def example_rows(self, rows: int) -> tuple[Tensor, ...]:
        """(rows, …) for every input, for tracing: the first examples, or zeros."""
        return InputRows(
            {
                spec.name: np.zeros((rows, *spec.shape), spec.dtype)
                if spec.examples is None
                else np.ascontiguousarray(spec.examples[np.arange(rows) % len(spec.examples)])
                for spec in self.inputs
            }
        ).tensors()

"""Four ways to share parameters between tasks, built of TaskExpert's own networks, and widths for a budget.

single-task   a backbone, one expert and a head for each task; nothing is shared
hard sharing  one backbone and one expert for all, a head for each task (Caruana 1997): TaskExpert with K = 1
              and without gates
cross-stitch  a backbone, an expert and a head for each task; after the backbones and after the experts each
              task goes on with a learned mix of all tasks' features (Misra et al. 2016):
              h'_t = Σ_u α_t,u · h_u, one α (T, T) per place, at first 0.9 on the diagonal and 0.1 / (T - 1)
              beside it
TaskExpert    one backbone, K experts, a gate and a head for each task

Cross-stitch stands for soft sharing because it shares when it predicts, too, and has no strength to choose.
Towers that are held together by an L2 penalty (Duong et al. 2015) have one, and once trained they are
single-task models.

B rows, D inputs, T tasks, K experts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from sharing_data import Task
from torch import Tensor, nn

from te_export.models.task_expert import (
    BackboneNetwork,
    ExpertNetwork,
    TaskExpertConfig,
    TaskExpertModel,
    TaskSpecificHead,
)
from te_export.models.task_expert_training import (
    BALANCE_WEIGHT,
    DIVERSITY_WEIGHT,
    balance_loss,
    diversity_loss,
)

EXPERTS = 6
DROPOUT = 0.1
BACKBONE_OVER_EXPERT = 2.0
"""What the solver aims at; the demo's model has this ratio, and as many experts."""
BUDGET_TOLERANCE = 0.01
MAX_EXPERT_DIM = 1024
OWN_SHARE = 0.9


class Family(StrEnum):
    SINGLE = "single-task"
    HARD = "hard sharing"
    STITCH = "cross-stitch"
    TASK_EXPERT = "TaskExpert"


@dataclass(frozen=True)
class Size:
    """Widths of a model, and what they come to.

    Attributes:
        parameters: of all tasks together, that a prediction depends on.
        unused_parameters: TaskExpert's feature_fusion, which no prediction reads and no step trains.
    """

    family: Family
    backbone_dim: int
    expert_dim: int
    parameters: int
    unused_parameters: int


class SharingModel(nn.Module):
    """x (B, D) → a prediction (B, out_t) for each task."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def training_outputs(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The predictions, and what is added to the tasks' losses: a scalar."""
        return self(x), x.new_zeros(())

    def networks(self) -> Sequence[nn.Module]:
        """What is trained apart: each has a gradient norm of its own."""
        return [self]


class HardSharing(SharingModel):
    def __init__(self, config: TaskExpertConfig) -> None:
        super().__init__()
        self.backbone = BackboneNetwork(config)
        self.expert = ExpertNetwork(config)
        self.heads = nn.ModuleList(TaskSpecificHead(config, size) for size in config.task_output_dims)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.expert(self.backbone(x))  # (B, expert_dim)
        return tuple(head(features) for head in self.heads)


class SingleTask(SharingModel):
    def __init__(self, config: TaskExpertConfig) -> None:
        super().__init__()
        self.models = nn.ModuleList(HardSharing(_for_task(config, size)) for size in config.task_output_dims)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(x)[0] for model in self.models)

    def networks(self) -> Sequence[nn.Module]:
        return list(self.models)


class CrossStitch(SharingModel):
    def __init__(self, config: TaskExpertConfig) -> None:
        super().__init__()
        tasks = config.num_tasks
        self.backbones = nn.ModuleList(BackboneNetwork(config) for _ in range(tasks))
        self.experts = nn.ModuleList(ExpertNetwork(config) for _ in range(tasks))
        self.heads = nn.ModuleList(TaskSpecificHead(config, size) for size in config.task_output_dims)
        beside = (1.0 - OWN_SHARE) / max(tasks - 1, 1)
        start = torch.full((tasks, tasks), beside).fill_diagonal_(OWN_SHARE)
        self.after_backbones = nn.Parameter(start.clone())
        self.after_experts = nn.Parameter(start.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mixed = _stitch(self.after_backbones, [backbone(x) for backbone in self.backbones])
        mixed = _stitch(
            self.after_experts, [expert(h) for expert, h in zip(self.experts, mixed, strict=True)]
        )
        return tuple(head(h) for head, h in zip(self.heads, mixed, strict=True))


class TaskExpert(SharingModel):
    def __init__(self, config: TaskExpertConfig) -> None:
        super().__init__()
        self.model = TaskExpertModel(config)
        self.tasks = range(config.num_tasks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(prediction for prediction, _ in self.model.tails(self.model.trunk(x), self.tasks))

    def training_outputs(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        predictions, weights = zip(*self.model.tails(self.model.trunk(x), self.tasks), strict=True)
        diversity = torch.stack([diversity_loss(w) for w in weights]).sum()
        balance = torch.stack([balance_loss(w) for w in weights]).sum()
        return predictions, DIVERSITY_WEIGHT * diversity + BALANCE_WEIGHT * balance


def _for_task(config: TaskExpertConfig, output_dim: int) -> TaskExpertConfig:
    return replace(config, num_tasks=1, task_output_dims=(output_dim,))


def _stitch(alpha: Tensor, features: Sequence[Tensor]) -> Sequence[Tensor]:
    """alpha (T, T), T features (B, D) → T mixes of them (B, D)."""
    mixed = torch.einsum("tu,ubd->tbd", alpha, torch.stack(list(features)))
    return mixed.unbind(dim=0)


FORMS: Mapping[Family, type[HardSharing | SingleTask | CrossStitch | TaskExpert]] = {
    Family.SINGLE: SingleTask,
    Family.HARD: HardSharing,
    Family.STITCH: CrossStitch,
    Family.TASK_EXPERT: TaskExpert,
}


def make_model(
    family: Family, *, input_dim: int, tasks: Sequence[Task], backbone_dim: int, expert_dim: int
) -> SharingModel:
    """A model with torch's default initial weights, from torch's random state."""
    return FORMS[family](
        TaskExpertConfig(
            input_dim=input_dim,
            backbone_dim=backbone_dim,
            expert_dim=expert_dim,
            num_experts=EXPERTS,
            num_tasks=len(tasks),
            task_output_dims=tuple(task.outputs for task in tasks),
            dropout=DROPOUT,
        )
    )


def find_size(family: Family, *, input_dim: int, tasks: Sequence[Task], budget: int) -> Size:
    """Among widths within BUDGET_TOLERANCE of the budget, those with the ratio nearest BACKBONE_OVER_EXPERT.

    Raises:
        ValueError: no widths come that near.
    """

    def measured(backbone_dim: int, expert_dim: int) -> Size:
        with torch.device("meta"):
            model = make_model(
                family, input_dim=input_dim, tasks=tasks, backbone_dim=backbone_dim, expert_dim=expert_dim
            )
        return Size(family, backbone_dim, expert_dim, *count_parameters(model))

    middle = bisect_left(
        range(MAX_EXPERT_DIM), budget, lo=2, key=lambda dim: measured(2 * dim, dim).parameters
    )
    near = [
        measured(backbone_dim, expert_dim)
        for expert_dim in range(max(middle - 2, 2), middle + 2)
        for backbone_dim in range(max(2 * middle - 5, 2), 2 * middle + 4)
    ]
    fitting = [size for size in near if abs(size.parameters / budget - 1) <= BUDGET_TOLERANCE]
    if not fitting:
        raise ValueError(f"no {family} model has {budget} parameters to within {BUDGET_TOLERANCE:.0%}")
    return min(fitting, key=lambda size: abs(size.backbone_dim / size.expert_dim - BACKBONE_OVER_EXPERT))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Those that a prediction depends on, and the others."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    unused = sum(size for name, size in sizes.items() if "feature_fusion." in name)
    return sum(sizes.values()) - unused, unused

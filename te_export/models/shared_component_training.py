"""Trains a shared-component model, measures it, and saves checkpoints of it.

    loss   = Σ_t loss_t
    loss_t = mean over rows of Σ_j P_t,j(x) · L_j(x)
    L_j(x) = ℓ_t(head_t(F_j(x)), target), the loss of component j's own prediction

ℓ_t is the cross-entropy (nats) of a task of kind `classes`, and the sum of the absolute errors of the coordinates of
a task of kind `box`. Both are convex, so the loss of the prediction itself is never above loss_t. Gradients reach P_t
as well: routing moves towards the components whose own predictions are better on such an input.

B batch, K components.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from te_export.models.checkpoint_file import write_checkpoint
from te_export.models.epochs import ReportEpoch, run_epochs
from te_export.models.shared_component import (
    SharedComponentConfig,
    SharedComponentModel,
    TaskKind,
    TaskTerms,
)

__all__ = [
    "SharedComponentTrainer",
    "StepLosses",
    "box_overlap",
    "component_losses",
    "evaluate",
    "fit",
    "new_model",
    "save_checkpoint",
    "task_loss",
]


@dataclass(frozen=True)
class StepLosses:
    """What one training step measured, before its update.

    Attributes:
        total: the loss that was minimized, the sum of `per_task`.
        per_task: Σ_j P_t,j · L_j, the mean over rows, by task name.
    """

    total: float
    per_task: Mapping[str, float]


def new_model(config: SharedComponentConfig, *, seed: int) -> SharedComponentModel:
    """A model with torch's default initial weights, drawn from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SharedComponentModel(config)


def component_losses(kind: TaskKind, predictions: Tensor, target: Tensor) -> Tensor:
    """The loss of every component's own prediction, row by row.

    Args:
        kind: of the task.
        predictions: (B, K, out).
        target: class indices (B,) int64 for `classes`, coordinates (B, out) for `box`.

    Returns:
        (B, K).
    """
    if kind == "box":
        return (predictions - target.unsqueeze(1)).abs().sum(dim=-1)  # (B, K, out) → (B, K)
    rows, components, _ = predictions.shape
    repeated = target.unsqueeze(1).expand(rows, components)
    return functional.cross_entropy(predictions.transpose(1, 2), repeated, reduction="none")


def task_loss(kind: TaskKind, terms: TaskTerms, target: Tensor) -> Tensor:
    """The mean over rows of Σ_j P_t,j · L_j, a scalar."""
    losses = component_losses(kind, terms.component_predictions, target)
    return (terms.routing_weights * losses).sum(dim=1).mean()


class SharedComponentTrainer:
    """AdamW on the sum of the tasks' losses, with the gradient norm clipped."""

    def __init__(
        self,
        model: SharedComponentModel,
        *,
        routing_rate_factor: float = 0.02,
        max_gradient_norm: float = 1.0,
    ) -> None:
        """Prepares the optimizer with the learning rate and weight decay of the model's config.

        Args:
            routing_rate_factor: the learning rate of routings, as a multiple of the config's. The loss is linear
                in P_t, so routing soon leaves a component that learns slowly; below 1, each has time to show
                what it can do.
            max_gradient_norm: bound on the L2 norm of all gradients together, above 0.
        """
        config = model.config
        self.model = model
        self.max_gradient_norm = max_gradient_norm
        self.steps_done = 0
        self.optimizer = torch.optim.AdamW(
            [*model.components.parameters(), *model.heads.parameters()],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        learned = list(model.routing.parameters())
        if learned:
            rate = config.learning_rate * routing_rate_factor
            self.optimizer.add_param_group({"params": learned, "lr": rate})

    def step(self, x: Tensor, targets: Mapping[str, Tensor]) -> StepLosses:
        """Makes one update.

        Args:
            x: images (B, C, H, W), values 0 to 1.
            targets: by task name, (B,) int64 or (B, out); a task that is not named is not trained.

        Returns:
            The losses before the update.

        Raises:
            ValueError: no task, an unknown one, or other row counts than the images'.
            FloatingPointError: the loss is not finite; no weight was changed.
        """
        _require_targets(self.model, x, targets)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        kinds = dict(zip(self.model.config.task_names, self.model.config.task_kinds, strict=True))
        terms = self.model.forward_with_terms(x)
        per_task = {name: task_loss(kinds[name], terms[name], target) for name, target in targets.items()}
        total = torch.stack(list(per_task.values())).sum()
        losses = StepLosses(total.item(), {name: loss.item() for name, loss in per_task.items()})
        if not math.isfinite(losses.total):
            raise FloatingPointError(
                f"the loss of step {self.steps_done} is {losses.total} (per task: {dict(losses.per_task)}), "
                "expected a finite number: look for NaN or infinity in the images, or lower the learning rate"
            )
        torch.autograd.backward(total)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_gradient_norm)
        self.optimizer.step()
        self.steps_done += 1
        return losses


def fit(
    trainer: SharedComponentTrainer,
    x: Tensor,
    targets: Mapping[str, Tensor],
    *,
    epochs: int,
    batch_rows: int,
    seed: int,
    report: ReportEpoch | None = None,
) -> list[float]:
    """Trains for `epochs` passes over the rows, each in a new order drawn from `seed`.

    Args:
        x, targets: as for SharedComponentTrainer.step, all training rows.
        report: told of every epoch, from 1, and its mean loss.

    Returns:
        The mean loss of every epoch.
    """

    def step(rows: Tensor) -> float:
        return trainer.step(x[rows], {name: target[rows] for name, target in targets.items()}).total

    return run_epochs(step, len(x), epochs=epochs, batch_rows=batch_rows, seed=seed, report=report)


def box_overlap(predicted: Tensor, target: Tensor) -> Tensor:
    """Area shared by two boxes over the area covered by either (intersection over union).

    Args:
        predicted, target: (B, 4): left, top, right, bottom in any one unit.

    Returns:
        (B,), 0 to 1; 0 where a box has no area.
    """
    low = torch.maximum(predicted[:, :2], target[:, :2])
    high = torch.minimum(predicted[:, 2:], target[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=1)
    areas = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(dim=1) for box in (predicted, target)]
    covered = areas[0] + areas[1] - shared
    return torch.where(covered > 0, shared / covered.clamp(min=torch.finfo(covered.dtype).tiny), 0.0)


@torch.no_grad()
def evaluate(model: SharedComponentModel, x: Tensor, targets: Mapping[str, Tensor]) -> dict[str, float]:
    """Accuracy of a task of kind `classes`, mean box_overlap of one of kind `box`, both 0 to 1, by task name.

    Args:
        x, targets: as for SharedComponentTrainer.step.

    Raises:
        ValueError: no task, an unknown one, or other row counts than the images'.
    """
    _require_targets(model, x, targets)
    kinds = dict(zip(model.config.task_names, model.config.task_kinds, strict=True))
    predictions = model(x)
    measured = {}
    for name, target in targets.items():
        found = predictions[name]
        right = found.argmax(dim=1) == target if kinds[name] == "classes" else box_overlap(found, target)
        measured[name] = float(right.float().mean())
    return measured


def save_checkpoint(path: str | Path, model: SharedComponentModel, *, epoch: int) -> None:
    """Writes state dict, config, task names and epoch; `torch.load(weights_only=True)` reads them.

    Raises:
        OSError: the file cannot be written; what was at `path` is unchanged.
    """
    config = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(model.config).items()
    }
    names = list(model.config.task_names)
    write_checkpoint(
        path, {"state_dict": model.state_dict(), "config": config, "task_names": names, "epoch": epoch}
    )


def _require_targets(model: SharedComponentModel, x: Tensor, targets: Mapping[str, Tensor]) -> None:
    unknown = sorted(set(targets) - set(model.config.task_names))
    if not targets or unknown:
        raise ValueError(
            f"targets of tasks {unknown or 'none'} given, the model has tasks {', '.join(model.config.task_names)}"
        )
    for name, target in targets.items():
        if len(target) != len(x) or len(x) == 0:
            raise ValueError(
                f"task {name!r} has {len(x)} images and {len(target)} targets: expected as many, at least 1"
            )

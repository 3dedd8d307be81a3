"""Trains a task-branch model in its two phases, measures it, and saves checkpoints of it.

1. Unsupervised: W becomes the encoder of an autoencoder over the standardized inputs z,

       loss = mean over rows and inputs of (z - ẑ)²,   ẑ = tanh(z Wᵀ + b) W + c

   The decoder is W itself, transposed; c (D,) serves this phase alone and is in no checkpoint.

2. Supervised: branches and β are fitted to their targets,

       loss = Σ_i mean (ŷ_i - target_i)² + mean (y - target of the aggregate)²

   the parameters of branch i with learning_rate · factor_i. W stays as the first phase left it, unless it is given a
   factor of its own.

Seeds are arguments: torch's global random state is left as it was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from te_export.models.checkpoint_file import write_checkpoint
from te_export.models.epochs import ReportEpoch, run_epochs
from te_export.models.task_branch import TaskBranchConfig, TaskBranchModel

__all__ = [
    "FineTuning",
    "StepLosses",
    "evaluate",
    "fine_tune",
    "new_model",
    "pretrain",
    "reconstruction_loss",
    "save_checkpoint",
]


@dataclass(frozen=True)
class StepLosses:
    """What one step of fine-tuning measured, before its update.

    Attributes:
        total: the loss that was minimized, the sum of `per_output`.
        per_output: mean squared error, by task name and for `aggregate`.
    """

    total: float
    per_output: Mapping[str, float]


def new_model(config: TaskBranchConfig, *, seed: int) -> TaskBranchModel:
    """A model with torch's default initial weights, drawn from `seed` alone, and even task weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TaskBranchModel(config)


def reconstruction_loss(model: TaskBranchModel, z: Tensor, bias: Tensor) -> Tensor:
    """How far the autoencoder's ẑ is from z, a scalar.

    Args:
        z: standardized inputs (B, D).
        bias: c (D,).
    """
    rebuilt = functional.linear(model.encode(z), model.shared.weight.t(), bias)  # (B, H) · W (H, D) → (B, D)
    return functional.mse_loss(rebuilt, z)


def pretrain(
    model: TaskBranchModel,
    x: Tensor,
    *,
    epochs: int,
    batch_rows: int,
    seed: int,
    learning_rate: float | None = None,
    report: ReportEpoch | None = None,
) -> list[float]:
    """The first phase: takes mean and scale from the rows, then trains W and b to rebuild them.

    Args:
        x: raw inputs (B, D), without targets.
        seed: of the order of the rows.
        learning_rate: of AdamW; the config's where None.

    Returns:
        The mean loss of every epoch.

    Raises:
        ValueError: no row, another number of columns, or values that are not finite.
        FloatingPointError: the loss is not finite.
    """
    model.standardize.set_from(x)
    with torch.no_grad():
        z = model.standardize(x)
    bias = nn.Parameter(torch.zeros_like(z[0]))
    config = model.config
    optimizer = torch.optim.AdamW(
        [*model.shared.parameters(), bias],
        lr=config.learning_rate if learning_rate is None else learning_rate,
        weight_decay=config.weight_decay,
    )

    def step(rows: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = reconstruction_loss(model, z[rows], bias)
        _require_finite(loss.item(), "reconstructing the inputs")
        torch.autograd.backward(loss)
        optimizer.step()
        return loss.item()

    return run_epochs(step, len(x), epochs=epochs, batch_rows=batch_rows, seed=seed, report=report)


class FineTuning:
    """AdamW on the squared errors of all outputs, every branch with its own learning rate."""

    def __init__(
        self,
        model: TaskBranchModel,
        *,
        rate_factors: Mapping[str, float] | None = None,
        task_weights_factor: float = 1.0,
        shared_factor: float = 0.0,
    ) -> None:
        """Prepares the optimizer; changes no weight.

        Args:
            rate_factors: learning rate of a task's branch as a multiple of the config's, 1 where nothing is said.
            task_weights_factor: the same for β.
            shared_factor: the same for W and b; 0 leaves them as they are.

        Raises:
            ValueError: a factor is of no task, negative, or not finite.
        """
        factors = dict(rate_factors or {})
        unknown = sorted(set(factors) - set(model.config.task_names))
        if unknown:
            raise ValueError(
                f"rate_factors of {', '.join(unknown)}: the tasks are {', '.join(model.config.task_names)}"
            )
        for factor in (*factors.values(), task_weights_factor, shared_factor):
            if not 0.0 <= factor < math.inf:
                raise ValueError(
                    f"a learning-rate factor is {factor}, expected a finite number of at least 0"
                )
        self.model = model
        self.steps_done = 0
        parts = [
            *((model.branches[i], factors.get(name, 1.0)) for i, name in enumerate(model.config.task_names)),
            (model.task_weights, task_weights_factor),
            (model.shared, shared_factor),
        ]
        config = model.config
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(part.parameters()), "lr": config.learning_rate * factor}
                for part, factor in parts
            ],
            weight_decay=config.weight_decay,
        )

    def step(self, x: Tensor, targets: Mapping[str, Tensor]) -> StepLosses:
        """Makes one update.

        Args:
            x: raw inputs (B, D).
            targets: (B, O) for every task, and for `aggregate`.

        Raises:
            ValueError: an output has no target, or a target is of no output or of another shape.
            FloatingPointError: the loss is not finite; no weight was changed.
        """
        _require_targets(self.model, x, targets)
        self.optimizer.zero_grad(set_to_none=True)
        outputs = self.model(x)
        per_output = {name: functional.mse_loss(found, targets[name]) for name, found in outputs.items()}
        total = torch.stack(list(per_output.values())).sum()
        _require_finite(total.item(), f"step {self.steps_done}")
        torch.autograd.backward(total)
        self.optimizer.step()
        self.steps_done += 1
        return StepLosses(total.item(), {name: loss.item() for name, loss in per_output.items()})


def fine_tune(
    tuning: FineTuning,
    x: Tensor,
    targets: Mapping[str, Tensor],
    *,
    epochs: int,
    batch_rows: int,
    seed: int,
    report: ReportEpoch | None = None,
) -> list[float]:
    """The second phase: `epochs` passes over the rows, each in a new order drawn from `seed`.

    Args:
        x, targets: as for FineTuning.step, all training rows.

    Returns:
        The mean loss of every epoch.
    """

    def step(rows: Tensor) -> float:
        return tuning.step(x[rows], {name: target[rows] for name, target in targets.items()}).total

    return run_epochs(step, len(x), epochs=epochs, batch_rows=batch_rows, seed=seed, report=report)


@torch.no_grad()
def evaluate(model: TaskBranchModel, x: Tensor, targets: Mapping[str, Tensor]) -> dict[str, float]:
    """R² of every output: 1 is exact, 0 is no better than the mean of the targets.

    Args:
        x, targets: as for FineTuning.step.

    Raises:
        ValueError: an output has no target, or a target is of no output or of another shape.
    """
    _require_targets(model, x, targets)
    measured = {}
    for name, found in model(x).items():
        target = targets[name]
        spread = (target - target.mean(dim=0)).square().sum()
        measured[name] = float(1.0 - (target - found).square().sum() / spread)
    return measured


def save_checkpoint(path: str | Path, model: TaskBranchModel, *, epoch: int) -> None:
    """Writes state dict, config, task names and epoch; `torch.load(weights_only=True)` reads them.

    Raises:
        OSError: the file cannot be written; what was at `path` is unchanged.
    """
    names = list(model.config.task_names)
    config = {**asdict(model.config), "task_names": names}
    write_checkpoint(
        path, {"state_dict": model.state_dict(), "config": config, "task_names": names, "epoch": epoch}
    )


def _require_targets(model: TaskBranchModel, x: Tensor, targets: Mapping[str, Tensor]) -> None:
    expected = set(model.output_names)
    if set(targets) != expected:
        raise ValueError(
            f"targets of {', '.join(sorted(targets)) or 'nothing'}, expected one for each of "
            f"{', '.join(model.output_names)}"
        )
    shape = (len(x), model.config.output_dim)
    for name, target in targets.items():
        if tuple(target.shape) != shape or len(x) == 0:
            raise ValueError(
                f"the target of {name!r} is {list(target.shape)}, expected {list(shape)}, at least one row"
            )


def _require_finite(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss of {where} is {loss}, expected a finite number: look for NaN or infinity in inputs and "
            "targets, or lower the learning rate"
        )

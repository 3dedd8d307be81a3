"""Trains a TaskExpert model, measures its accuracy, and saves checkpoints of it.

    loss = Σ_t [ cross-entropy_t + 0.1 · diversity_t + 0.05 · balance_t ]
    diversity_t = −mean over rows of the entropy of w_t, entropy(w) = −Σ_i w_i · log(w_i + 1e-8)
    balance_t   = standard deviation over experts of the mean over rows of w_t

B batch, K experts, T tasks, D features.
Seeds are arguments: torch's global random state is left as it was found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from te_export.models.checkpoint_file import write_checkpoint
from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel

__all__ = [
    "Evaluation",
    "StepLosses",
    "TaskExpertTrainer",
    "TaskTensors",
    "balance_loss",
    "diversity_loss",
    "evaluate",
    "new_model",
    "save_checkpoint",
]

DIVERSITY_WEIGHT = 0.1
BALANCE_WEIGHT = 0.05
ENTROPY_EPSILON = 1e-8

# One tensor per task: in task order, or keyed by task index where only some tasks have data.
TaskTensors = Sequence[Tensor] | Mapping[int, Tensor]


@dataclass(frozen=True)
class StepLosses:
    """What one training step measured, before its update.

    Attributes:
        total: the loss that was minimized: Σ per_task + 0.1 · diversity + 0.05 · balance.
        per_task: cross-entropy of each task, in nats, keyed by task index.
        diversity: Σ over tasks of minus the mean entropy of the routing weights, in nats, before its factor.
        balance: Σ over tasks of the standard deviation of the mean routing weights, before its factor.
    """

    total: float
    per_task: Mapping[int, float]
    diversity: float
    balance: float


@dataclass(frozen=True)
class Evaluation:
    """Share of rows whose arg-max is the target.

    Attributes:
        accuracy: 0 to 1, keyed by task index.
        mean_accuracy: mean of `accuracy` over the tasks measured.
    """

    accuracy: Mapping[int, float]
    mean_accuracy: float


def new_model(config: TaskExpertConfig, *, seed: int) -> TaskExpertModel:
    """A model with torch's default initial weights, drawn from `seed` alone."""
    with _seeded(seed, torch.device("cpu")):
        return TaskExpertModel(config)


def diversity_loss(routing_weights: Tensor) -> Tensor:
    """Minus the mean entropy of the routing weights.

    Args:
        routing_weights: (B, K), rows summing to 1.

    Returns:
        Scalar in nats, −log K (spread evenly) to 0 (one expert takes all).
    """
    entropy = -(routing_weights * torch.log(routing_weights + ENTROPY_EPSILON)).sum(dim=-1)  # (B, K) → (B,)
    return -entropy.mean()


def balance_loss(routing_weights: Tensor) -> Tensor:
    """Standard deviation over experts of the mean routing weight.

    The sample standard deviation (K − 1 in the divisor, as torch.std has it); 0 where there is one expert.

    Args:
        routing_weights: (B, K), rows summing to 1.

    Returns:
        Scalar, 0 where every expert gets the same mean weight.
    """
    mean_weights = routing_weights.mean(dim=0)  # (B, K) → (K,)
    if mean_weights.numel() == 1:
        return mean_weights.new_zeros(())
    return mean_weights.std()


class TaskExpertTrainer:
    """AdamW on the weighted loss of all tasks, with the gradient norm clipped."""

    def __init__(
        self,
        model: TaskExpertModel,
        *,
        seed: int = 0,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        max_gradient_norm: float = 1.0,
    ) -> None:
        """Prepares the optimizer; changes no weight.

        Args:
            model: trained in place, on the device it is on.
            seed: of the dropout masks; step n draws from `seed + n`.
            learning_rate: of AdamW; the model's config says it where None.
            weight_decay: of AdamW; the model's config says it where None.
            max_gradient_norm: bound on the L2 norm of all gradients together, above 0.
        """
        config = model.config
        self.model = model
        self.seed = seed
        self.max_gradient_norm = max_gradient_norm
        self.steps_done = 0
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate if learning_rate is None else learning_rate,
            weight_decay=config.weight_decay if weight_decay is None else weight_decay,
        )

    def step(self, inputs: TaskTensors, targets: TaskTensors) -> StepLosses:
        """Makes one update from one batch per task.

        Args:
            inputs: per task (B_t, input_dim) or (B_t, C, H, W), float; tasks given the same tensor object share a trunk run.
            targets: per task (B_t,), int64 class indices; the same tasks as `inputs`.

        Returns:
            The losses before the update.

        Raises:
            ValueError: inputs and targets are of different tasks or row counts, or of none.
            FloatingPointError: the loss is not finite; no weight was changed.
        """
        inputs_by_task, targets_by_task = _paired(inputs, targets, self.model.config.num_tasks)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with _seeded(self.seed + self.steps_done, next(self.model.parameters()).device):
            outputs = _outputs(self.model, inputs_by_task)
        total, losses = _losses(outputs, targets_by_task)
        if not math.isfinite(losses.total):
            raise FloatingPointError(
                f"the loss of step {self.steps_done} is {losses.total} (per task: {dict(losses.per_task)}), "
                "expected a finite number: look for NaN or infinity in the inputs, or lower the learning rate"
            )
        torch.autograd.backward(total)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_gradient_norm)
        self.optimizer.step()
        self.steps_done += 1
        return losses


@torch.no_grad()
def evaluate(model: TaskExpertModel, inputs: TaskTensors, targets: TaskTensors) -> Evaluation:
    """Accuracy of every task given, without dropout.

    Args:
        model: put in eval mode for the measurement; every module's mode is restored after it.
        inputs: per task (B_t, input_dim) or (B_t, C, H, W), float; tasks given the same tensor object share a trunk run.
        targets: per task (B_t,), int64 class indices; the same tasks as `inputs`.

    Raises:
        ValueError: inputs and targets are of different tasks or row counts, or of none.
    """
    inputs_by_task, targets_by_task = _paired(inputs, targets, model.config.num_tasks)
    with _eval_mode(model):
        outputs = _outputs(model, inputs_by_task)
    accuracy = {
        task: float((prediction.argmax(dim=-1) == targets_by_task[task]).float().mean().item())
        for task, (prediction, _) in outputs.items()
    }
    return Evaluation(accuracy=accuracy, mean_accuracy=sum(accuracy.values()) / len(accuracy))


def save_checkpoint(
    path: str | Path,
    model: TaskExpertModel,
    *,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    task_names: Sequence[str],
) -> None:
    """Writes a checkpoint that `torch.load(weights_only=True)` reads; the file appears whole or not at all.

    Args:
        path: of the file; its folder must exist, and a file that is there is replaced.
        model: its weights and config are saved.
        epoch: of training, number of epochs done.
        optimizer: its state is saved, so that training can go on.
        task_names: one per task, in task order.

    Raises:
        ValueError: the number of names is not the number of tasks.
        OSError: the file cannot be written; what was at `path` is unchanged.
    """
    if len(task_names) != model.config.num_tasks:
        raise ValueError(
            f"{len(task_names)} task names, the model has {model.config.num_tasks} tasks: expected one each"
        )
    config = asdict(model.config)
    contents = {
        "state_dict": model.state_dict(),
        "config": {
            name: list(value) if isinstance(value, tuple) else value for name, value in config.items()
        },
        "task_names": list(task_names),
        "epoch": epoch,
        "optimizer_state_dict": optimizer.state_dict(),
    }
    write_checkpoint(path, contents)


def _paired(
    inputs: TaskTensors, targets: TaskTensors, num_tasks: int
) -> tuple[Mapping[int, Tensor], Mapping[int, Tensor]]:
    """Both as mappings from task index, checked against each other and the model."""
    inputs_by_task, targets_by_task = _by_task(inputs), _by_task(targets)
    if inputs_by_task.keys() != targets_by_task.keys():
        raise ValueError(
            f"inputs are of tasks {sorted(inputs_by_task)}, targets of tasks {sorted(targets_by_task)}: "
            "expected the same tasks"
        )
    unknown = sorted(task for task in inputs_by_task if not 0 <= task < num_tasks)
    if not inputs_by_task or unknown:
        raise ValueError(f"tasks {unknown or 'none'} given, the model has tasks 0 to {num_tasks - 1}")
    for task, x in inputs_by_task.items():
        rows, labels = x.shape[0], targets_by_task[task].shape[0]
        if rows != labels or rows == 0:
            raise ValueError(
                f"task {task} has {rows} input rows and {labels} targets: expected as many, at least 1"
            )
    return inputs_by_task, targets_by_task


def _by_task(tensors: TaskTensors) -> Mapping[int, Tensor]:
    return tensors if isinstance(tensors, Mapping) else dict(enumerate(tensors))


def _outputs(model: TaskExpertModel, inputs: Mapping[int, Tensor]) -> Mapping[int, tuple[Tensor, Tensor]]:
    """Per task prediction (B_t, out_t) and routing weights (B_t, K); one trunk run per distinct input."""
    distinct = {id(x): x for x in inputs.values()}
    outputs: dict[int, tuple[Tensor, Tensor]] = {}
    for key, x in distinct.items():
        tasks = [task for task, given in inputs.items() if id(given) == key]
        outputs |= zip(tasks, model.tails(model.trunk(x), tasks), strict=True)
    return {task: outputs[task] for task in inputs}


def _losses(
    outputs: Mapping[int, tuple[Tensor, Tensor]], targets: Mapping[int, Tensor]
) -> tuple[Tensor, StepLosses]:
    """The loss to minimize, a scalar with a gradient, and its parts as numbers."""
    per_task = {
        task: functional.cross_entropy(prediction, targets[task]) for task, (prediction, _) in outputs.items()
    }
    diversity = torch.stack([diversity_loss(weights) for _, weights in outputs.values()]).sum()
    balance = torch.stack([balance_loss(weights) for _, weights in outputs.values()]).sum()
    cross_entropy = torch.stack(list(per_task.values())).sum()
    total = cross_entropy + DIVERSITY_WEIGHT * diversity + BALANCE_WEIGHT * balance
    return total, StepLosses(
        total=total.item(),
        per_task={task: loss.item() for task, loss in per_task.items()},
        diversity=diversity.item(),
        balance=balance.item(),
    )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws inside come from `seed`; torch's random state is what it was, after."""
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked):
        torch.manual_seed(seed)
        yield


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training

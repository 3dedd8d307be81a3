"""Trains one model on one split, and judges it on the rows held out. The same steps for every family.

    loss = Σ_t loss_t + what TaskExpert adds for its routing weights

loss_t is the cross-entropy of classes, or the mean squared error of standardized values; tasks count alike.
Nothing is chosen by looking at rows: each model is judged after the same numbers of steps, and all are shown.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sharing_data import Rows, Split, Task
from sharing_models import SharingModel, Size, TaskExpert, make_model
from sharing_results import Reference, Routing, Run
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, r2_score
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class TrainingOptions:
    """The same for every family; TaskExpert's own defaults where it has any.

    Attributes:
        judged_after: numbers of steps, ascending; training ends with the last.
    """

    judged_after: tuple[int, ...] = (600, 2400)
    batch_rows: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    max_gradient_norm: float = 1.0


def run_family(
    size: Size, split: Split, tasks: Sequence[Task], *, options: TrainingOptions, seed: int
) -> tuple[Run, SharingModel]:
    """Trains a new model; `seed` draws its weights, its dropout masks and the order of the rows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make_model(
            size.family,
            input_dim=split.training.x.shape[1],
            tasks=tasks,
            backbone_dim=size.backbone_dim,
            expert_dim=size.expert_dim,
        )
        scores = {}
        training_cpu_s, began_s = 0.0, time.process_time()
        for steps in train(model, split.training, tasks, options=options, seed=seed):
            training_cpu_s += time.process_time() - began_s
            scores[steps] = held_out_scores(model, split.held_out, tasks)
            began_s = time.process_time()
    return (
        Run(
            family=size.family,
            seed=seed,
            scores=scores,
            training_cpu_s=training_cpu_s,
            routing=mean_routing(model, split.held_out.x) if isinstance(model, TaskExpert) else None,
        ),
        model,
    )


def train(
    model: SharingModel, training: Rows, tasks: Sequence[Task], *, options: TrainingOptions, seed: int
) -> Iterator[int]:
    """Trains, and stops after each number of steps in `options.judged_after` with the model in eval mode."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    batches = draw_batches(len(training.x), options.batch_rows, seed)
    model.train()
    for step, rows in zip(range(1, options.judged_after[-1] + 1), batches, strict=False):
        optimizer.zero_grad(set_to_none=True)
        predictions, routing_loss = model.training_outputs(training.x[rows])
        targets = [target[rows] for target in training.targets]
        losses = [task_loss(*each) for each in zip(tasks, predictions, targets, strict=True)]
        torch.autograd.backward(torch.stack(losses).sum() + routing_loss)
        for network in model.networks():
            nn.utils.clip_grad_norm_(network.parameters(), options.max_gradient_norm)
        optimizer.step()
        if step in options.judged_after:
            model.eval()
            yield step
            model.train()
    model.eval()


def draw_batches(count: int, batch_rows: int, seed: int) -> Iterator[Tensor]:
    """Row indices (batch_rows,) without end: a new order each pass, leaving out what fills no batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from torch.split(order[: count - count % batch_rows], batch_rows)


def task_loss(task: Task, prediction: Tensor, target: Tensor) -> Tensor:
    """Scalar, of predictions (B, out_t)."""
    if task.classes is None:
        return functional.mse_loss(prediction, target)
    return functional.cross_entropy(prediction, target)


@torch.no_grad()
def held_out_scores(model: SharingModel, held_out: Rows, tasks: Sequence[Task]) -> dict[str, float]:
    """Accuracy or R² per task."""
    predictions = model(held_out.x)
    return {
        task.name: score(task, _answer(task, prediction), target)
        for task, prediction, target in zip(tasks, predictions, held_out.targets, strict=True)
    }


def score(task: Task, answer: NDArray[np.generic], target: Tensor) -> float:
    """Of classes (B,) or values (B, 1)."""
    measure = r2_score if task.classes is None else accuracy_score
    return float(measure(target.numpy(), answer))


@torch.no_grad()
def mean_routing(model: TaskExpert, x: Tensor) -> Routing:
    used = model.model.get_expert_utilization(x, model.tasks)
    return [used[f"task_{task}"] for task in model.tasks]


def reference_scores(split: Split, tasks: Sequence[Task], seed: int) -> list[Reference]:
    """What needs no network: the most frequent class or the mean, scikit-learn's linear model per task."""
    made = {
        "most frequent class, mean": (DummyClassifier(), DummyRegressor()),
        "linear, per task": (LogisticRegression(max_iter=5000), Ridge()),
    }
    x, held_out_x = split.training.x.numpy(), split.held_out.x.numpy()
    found = []
    for name, (classifier, regressor) in made.items():
        scores = {}
        for task, target, held_out in zip(tasks, split.training.targets, split.held_out.targets, strict=True):
            fitted = (regressor if task.classes is None else classifier).fit(x, target.numpy())
            scores[task.name] = score(task, fitted.predict(held_out_x), held_out)
        found.append(Reference(name, seed, scores))
    return found


def _answer(task: Task, prediction: Tensor) -> NDArray[np.generic]:
    answer: NDArray[np.generic] = (prediction if task.classes is None else prediction.argmax(dim=1)).numpy()
    return answer

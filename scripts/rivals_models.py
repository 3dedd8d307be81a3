"""The models that rivals run, rows for them, and what torch answers in float64.

R has weights that keep the spread of values from layer to layer, other than torch's own initial ones: with those, answers
of R are nearly the same for every row, and a check of them would tell little.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import demo_train
import numpy as np
import torch
from numpy.typing import NDArray
from reference_graphs import AllTasks, make_model
from rivals_plan import Family, ModelChoice
from torch import nn

from te_export.models.task_expert import TaskExpertModel
from te_export.models.task_expert_training import Evaluation

DRAWN_ROWS = 1024
ORACLE_ROWS = 512


@dataclass(frozen=True)
class Model:
    """A model in eval mode, and rows to predict.

    Attributes:
        rows: (N, D) float32.
        note: a sentence for people.
    """

    choice: ModelChoice
    module: TaskExpertModel
    rows: NDArray[np.float32]
    note: str
    _answers: dict[int, list[NDArray[np.float64]]] = field(default_factory=dict)

    @property
    def task_names(self) -> tuple[str, ...]:
        """As te-export names the tasks of a state dict without names."""
        return tuple(f"task_{task}" for task in range(self.choice.tasks))

    def batch(self, size: int) -> NDArray[np.float32]:
        """(size, D), the rows over and over where there are too few."""
        return np.resize(self.rows, (size, self.rows.shape[1]))

    def answers(self, size: int) -> list[NDArray[np.float64]]:
        """For each task (size, outputs): torch's predictions of batch(size) in float64."""
        if size not in self._answers:
            with torch.inference_mode():
                found = self._oracle(torch.from_numpy(self.batch(size)).double())
            self._answers[size] = [prediction.numpy() for prediction in found]
        return self._answers[size]

    @cached_property
    def deviations(self) -> list[float]:
        """For each task, how much float64's answers vary from row to row."""
        return [float(np.sqrt(np.var(answers, axis=0).mean())) for answers in self.answers(ORACLE_ROWS)]

    @cached_property
    def _oracle(self) -> AllTasks:
        return AllTasks(copy.deepcopy(self.module).double())


def build_model(choice: ModelChoice) -> Model:
    """The model of a choice, drawn or trained; the same every time."""
    return _draw(choice) if choice.family is Family.R else _train(choice)


def _draw(choice: ModelChoice) -> Model:
    module = make_model(choice.tasks, choice.experts)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0, math.sqrt(2 / layer.in_features), generator=generator)
    rows = np.random.default_rng(0).standard_normal((DRAWN_ROWS, module.config.input_dim), dtype=np.float32)
    return Model(choice, module, rows, "weights drawn, rows standard normal")


def _train(choice: ModelChoice) -> Model:
    training, held_out = demo_train.digit_rows()
    accuracies: list[float] = []

    def report(epoch: int, *, loss: float, held_out: Evaluation) -> None:  # noqa: ARG001
        accuracies.append(held_out.mean_accuracy)

    module, _ = demo_train.train(training, held_out, report)
    found = (module.config.num_tasks, module.config.num_experts)
    if found != (choice.tasks, choice.experts):
        raise ValueError(f"the demo trains {found} tasks and experts, the plan expects {choice.label}")
    note = f"trained as scripts/demo does, mean accuracy on held-out rows {accuracies[-1]:.1%}"
    return Model(choice, module.eval(), _as_rows(held_out.x), note)


def _as_rows(x: torch.Tensor) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = x.numpy()
    return rows


def as_arrays(predictions: Sequence[torch.Tensor]) -> list[NDArray[np.generic]]:
    """Copied to the CPU where they are elsewhere, which waits for the device to finish."""
    return [prediction.cpu().numpy() for prediction in predictions]

"""Trains the demo's TaskExpert on scikit-learn's handwritten digits; stores what later steps compare with.

Four real tasks are read off the same 8 x 8 image:

    digit              which digit it is (10 classes)
    parity             even or odd (2)
    closed_loops       closed loops of the digit's shape: 8 has two, 0, 6 and 9 have one, the others none (3)
    heaviest_quadrant  which quarter of the image has most ink (4)

Writes into the output folder, model.pt last, so that a run that was interrupted is seen as unfinished:

    held-out.npz           x (B, 64) float32, 0 to 1
    held-out-labels.npz    per task: class indices (B,) int64
    torch-predictions.npz  per task: torch's predictions (B, out_t) float32
    model.pt               the checkpoint
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel
from te_export.models.task_expert_training import (
    Evaluation,
    TaskExpertTrainer,
    evaluate,
    new_model,
    save_checkpoint,
)

SEED = 0
EPOCHS = 16
BATCH_ROWS = 96
HELD_OUT_ROWS = 360
CLASSES = {"digit": 10, "parity": 2, "closed_loops": 3, "heaviest_quadrant": 4}
LOOPS_OF_DIGIT = np.array([1, 0, 0, 0, 0, 0, 1, 0, 2, 1])
CONFIG = TaskExpertConfig(
    input_dim=64,
    backbone_dim=128,
    expert_dim=64,
    num_experts=6,
    num_tasks=len(CLASSES),
    task_output_dims=tuple(CLASSES.values()),
    learning_rate=5e-3,
)


@dataclass(frozen=True)
class Rows:
    """Images (B, 64) float32 scaled to 0..1, and per task class indices (B,) int64."""

    x: torch.Tensor
    labels: dict[str, torch.Tensor]

    @property
    def targets(self) -> list[torch.Tensor]:
        """The labels in task order."""
        return list(self.labels.values())

    def take(self, indices: torch.Tensor) -> Rows:
        """The rows at `indices` (N,)."""
        return Rows(self.x[indices], {task: label[indices] for task, label in self.labels.items()})


def digit_rows() -> tuple[Rows, Rows]:
    """Training rows and held-out rows, the same ones every time."""
    images, digits = load_digits(return_X_y=True)
    x, held_out_x, digit, held_out_digit = train_test_split(
        images / 16.0, digits, test_size=HELD_OUT_ROWS, stratify=digits, random_state=SEED
    )
    return labelled(x, digit), labelled(held_out_x, held_out_digit)


def labelled(x: NDArray[np.float64], digit: NDArray[np.int64]) -> Rows:
    """Images (B, 64) and their digits (B,) with the labels of every task."""
    # (B, upper or lower half, row, left or right half, column), ink summed over rows and columns → (B, 4)
    ink_of_quadrant = x.reshape(-1, 2, 4, 2, 4).sum(axis=(2, 4)).reshape(-1, 4)
    labels = {
        "digit": digit,
        "parity": digit % 2,
        "closed_loops": LOOPS_OF_DIGIT[digit],
        "heaviest_quadrant": ink_of_quadrant.argmax(axis=1),
    }
    as_tensors = {task: torch.from_numpy(labels[task].astype(np.int64)) for task in CLASSES}
    return Rows(torch.from_numpy(x.astype(np.float32)), as_tensors)


class ReportEpoch(Protocol):
    """Called after every epoch."""

    def __call__(self, epoch: int, *, loss: float, held_out: Evaluation) -> None: ...


def train(training: Rows, held_out: Rows, report: ReportEpoch) -> tuple[TaskExpertModel, TaskExpertTrainer]:
    """Trains a new model for EPOCHS passes over the training rows, in a new order each."""
    model = new_model(CONFIG, seed=SEED)
    trainer = TaskExpertTrainer(model, seed=SEED)
    order = torch.Generator().manual_seed(SEED)
    for epoch in range(1, EPOCHS + 1):
        losses = []
        for indices in torch.split(torch.randperm(len(training.x), generator=order), BATCH_ROWS):
            batch = training.take(indices)
            losses.append(trainer.step([batch.x] * len(CLASSES), batch.targets).total)
        measured = evaluate(model, [held_out.x] * len(CLASSES), held_out.targets)
        report(epoch, loss=sum(losses) / len(losses), held_out=measured)
    return model, trainer


@contextmanager
def shown(console: Console) -> Iterator[ReportEpoch]:
    """A bar on a terminal; in a pipe, a line every fourth epoch."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, disable=not console.is_terminal
    ) as bar:
        handle = bar.add_task("", total=EPOCHS)

        def report(epoch: int, *, loss: float, held_out: Evaluation) -> None:
            figures = f"loss {loss:.3f}, held-out accuracy {held_out.mean_accuracy:.1%}"
            bar.update(handle, completed=epoch, description=figures)
            if not console.is_terminal and (epoch == 1 or epoch % 4 == 0):
                console.print(f"demo: epoch {epoch} of {EPOCHS}, {figures}")

        yield report


def save_arrays(path: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Writes an .npz file with one array per name."""
    np.savez(path, allow_pickle=False, **arrays)


@torch.no_grad()
def store(folder: Path, *, held_out: Rows, model: TaskExpertModel, optimizer: torch.optim.Optimizer) -> None:
    """Writes the held-out rows, their labels, torch's predictions of them, and the checkpoint."""
    model.eval()
    predictions = {task: model(held_out.x, index)[0].numpy() for index, task in enumerate(CLASSES)}
    labels = {task: label.numpy() for task, label in held_out.labels.items()}
    save_arrays(folder / "held-out.npz", {"x": held_out.x.numpy()})
    save_arrays(folder / "held-out-labels.npz", labels)
    save_arrays(folder / "torch-predictions.npz", predictions)
    save_checkpoint(folder / "model.pt", model, epoch=EPOCHS, optimizer=optimizer, task_names=list(CLASSES))


def main(folder: Path) -> None:
    """Trains, and stores everything in `folder`."""
    console = Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(
        1
    )  # layers this small gain little from a second thread, and lose much on a busy machine
    folder.mkdir(parents=True, exist_ok=True)
    training, held_out = digit_rows()
    console.print(
        f"demo: training {CONFIG.num_experts} experts on {len(training.x)} handwritten digits, "
        f"{len(held_out.x)} held out; tasks: {', '.join(CLASSES)}"
    )
    began_s = time.perf_counter()
    with shown(console) as report:
        model, trainer = train(training, held_out, report)
    store(folder, held_out=held_out, model=model, optimizer=trainer.optimizer)
    console.print(f"demo: trained in {time.perf_counter() - began_s:.1f} s, wrote {folder / 'model.pt'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

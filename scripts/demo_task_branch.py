"""Trains a task-branch model on breast-cancer measurements, exports it, and compares with torch.

    python scripts/demo_task_branch.py demo-output/task-branch

scikit-learn's data set has ten measurements of the cell nuclei in a tissue sample, each three times: its mean over the
nuclei, the standard error of that, and the mean of the three largest ("worst"). Inputs are the twenty means and errors,
in their own units, from 0.002 to 2500. Every target is standardized over the training rows:

    radius, texture, smoothness, concavity   a branch each: that measurement's "worst" value
    aggregate                                Σ β_i · branch i, fitted to the diagnosis: malignant is above, benign below

So β says how much each worst measurement, predicted from the others, counts for the diagnosis. Writes model.pt and the
bundle model-onnx into the folder.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

import te_export
import te_runtime
from te_export.models.task_branch import AGGREGATE, TaskBranchConfig, TaskBranchModel
from te_export.models.task_branch_training import (
    FineTuning,
    evaluate,
    fine_tune,
    new_model,
    pretrain,
    save_checkpoint,
)

SEED = 0
HELD_OUT_ROWS = 142
PRETRAINING_EPOCHS = 80
EPOCHS = 80
BATCH_ROWS = 32
WORST_COLUMN = {"radius": 20, "texture": 21, "smoothness": 24, "concavity": 26}
RATE_FACTORS = {"radius": 0.5, "texture": 1.0, "smoothness": 1.0, "concavity": 1.0}
CONFIG = TaskBranchConfig(
    input_dim=20,
    shared_dim=32,
    branch_dim=16,
    output_dim=1,
    task_names=tuple(WORST_COLUMN),
    learning_rate=5e-3,
)


@dataclass(frozen=True)
class Rows:
    """Measurements (B, 20) float32, and the standardized target (B, 1) float32 of every output.

    Attributes:
        is_malignant: (B,) bool.
        threshold: where the diagnosis turns, halfway between the two values its standardized target has.
    """

    x: torch.Tensor
    targets: dict[str, torch.Tensor]
    is_malignant: torch.Tensor
    threshold: float


def measurement_rows() -> tuple[Rows, Rows]:
    """Training rows and held-out rows, the same ones every time."""
    values, is_benign = load_breast_cancer(return_X_y=True)
    training, held_out, benign, held_out_benign = train_test_split(
        values, is_benign, test_size=HELD_OUT_ROWS, stratify=is_benign, random_state=SEED
    )
    raw, held_out_raw = raw_targets(training, 1 - benign), raw_targets(held_out, 1 - held_out_benign)
    mean, scale = raw.mean(axis=0), raw.std(axis=0)
    threshold = float((0.5 - mean[-1]) / scale[-1])
    return (
        rows_of(training, (raw - mean) / scale, benign == 0, threshold),
        rows_of(held_out, (held_out_raw - mean) / scale, held_out_benign == 0, threshold),
    )


def raw_targets(values: NDArray[np.float64], is_malignant: NDArray[np.int64]) -> NDArray[np.float64]:
    """(B, 30) and (B,) → (B, 5): the tasks' targets and the aggregate's, in their own units."""
    worst = values[:, list(WORST_COLUMN.values())]
    return np.concatenate([worst, is_malignant[:, None].astype(np.float64)], axis=1)


def rows_of(
    values: NDArray[np.float64],
    targets: NDArray[np.float64],
    is_malignant: NDArray[np.bool_],
    threshold: float,
) -> Rows:
    """Measurements (B, 30), standardized targets (B, 5) and the diagnosis (B,) as tensors."""
    columns = torch.from_numpy(targets.astype(np.float32))
    return Rows(
        x=torch.from_numpy(values[:, :20].astype(np.float32)),
        targets={name: columns[:, i : i + 1] for i, name in enumerate((*WORST_COLUMN, AGGREGATE))},
        is_malignant=torch.from_numpy(is_malignant),
        threshold=threshold,
    )


def train(console: Console, training: Rows) -> TaskBranchModel:
    """Both phases on a new model."""
    model = new_model(CONFIG, seed=SEED)
    rebuilt = pretrain(model, training.x, epochs=PRETRAINING_EPOCHS, batch_rows=BATCH_ROWS, seed=SEED)
    console.print(
        f"demo: pre-trained W as an autoencoder, mean squared error {rebuilt[0]:.3f} → {rebuilt[-1]:.3f} "
        "of variance 1"
    )
    tuning = FineTuning(model, rate_factors=RATE_FACTORS)
    losses = fine_tune(tuning, training.x, training.targets, epochs=EPOCHS, batch_rows=BATCH_ROWS, seed=SEED)
    console.print(f"demo: fitted branches and β, loss {losses[0]:.2f} → {losses[-1]:.2f} over five outputs")
    return model.eval()


@torch.no_grad()
def table_of(model: TaskBranchModel, held_out: Rows) -> Table:
    """R² and β of every output."""
    r2 = evaluate(model, held_out.x, held_out.targets)
    beta = torch.softmax(model.task_weights.logits, dim=0).tolist()
    table = Table(title=f"{len(held_out.x)} held-out samples", title_justify="left")
    table.add_column("output")
    table.add_column("R²", justify="right")
    table.add_column("β", justify="right")
    for name, share in zip(model.output_names, [*beta, None], strict=True):
        table.add_row(name, f"{r2[name]:.3f}", "" if share is None else f"{share:.2f}")
    return table


@torch.no_grad()
def diagnosis_accuracy(model: TaskBranchModel, rows: Rows) -> float:
    """Share of samples whose aggregate lies on their diagnosis' side of the threshold."""
    found = model(rows.x)[AGGREGATE][:, 0] > rows.threshold
    return float((found == rows.is_malignant).float().mean())


def largest_differences(model: TaskBranchModel, bundle: Path, x: torch.Tensor) -> dict[str, float]:
    """By output, the largest |ONNX Runtime - torch| over all rows."""
    with torch.no_grad():
        by_torch = model(x)
    with te_runtime.load(bundle, provider="cpu") as runtime:
        by_onnx = runtime.predict(x.numpy())
    return {
        name: float(np.abs(by_onnx[name].output - by_torch[name].numpy()).max())
        for name in model.output_names
    }


def main(folder: Path) -> None:
    """Trains, saves, measures, exports, and compares."""
    console = Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    training, held_out = measurement_rows()
    console.print(
        f"demo: training {len(WORST_COLUMN)} branches on {len(training.x)} samples, {len(held_out.x)} held out"
    )
    began_s = time.perf_counter()
    model = train(console, training)
    checkpoint = folder / "model.pt"
    save_checkpoint(checkpoint, model, epoch=EPOCHS)
    console.print(f"demo: trained in {time.perf_counter() - began_s:.1f} s, wrote {checkpoint}")
    console.print(table_of(model, held_out))
    console.print(
        f"demo: the aggregate is on the diagnosis' side for {diagnosis_accuracy(model, held_out):.1%} of them"
    )
    bundle = folder / "model-onnx"
    te_export.export(checkpoint, bundle, te_export.ExportOptions(force=True))
    for name, difference in largest_differences(model, bundle, held_out.x).items():
        console.print(
            f"demo: {name}: ONNX Runtime is within {difference:.1e} of torch on every held-out sample"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

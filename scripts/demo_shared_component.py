"""Trains a shared-component model to read and to find handwritten digits, exports it, and compares with torch.

    python scripts/demo_shared_component.py demo-output/shared-component

The digits are scikit-learn's, 8 x 8 and real; their places are ours. Each digit is enlarged to a random side of 24 to
28 pixels (nearest neighbour), its ink gets a random bright colour, and it is laid at a random place on a 32 x 32 image
of dim noise. Two tasks of different kinds are read off that image:

    digit  which digit it is (10 classes)
    box    the smallest rectangle that holds all its ink: left, top, right, bottom as fractions of the image's sides

Held-out rows are made of digits that training never saw. Writes model.pt and the bundle model-onnx into the folder.
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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import te_export
import te_runtime
from te_export.models.shared_component import SharedComponentConfig, SharedComponentModel
from te_export.models.shared_component_training import (
    SharedComponentTrainer,
    evaluate,
    fit,
    new_model,
    save_checkpoint,
)

SEED = 0
EPOCHS = 10
BATCH_ROWS = 48
HELD_OUT_DIGITS = 360
PLACES_PER_DIGIT = 2
SIDE = 32
CONFIG = SharedComponentConfig(
    image_shape=(3, SIDE, SIDE),
    component_kinds=("convolutional", "dense", "profile"),
    component_widths=(8, 64, 96),
    feature_dim=64,
    gate_dim=32,
    task_names=("digit", "box"),
    task_kinds=("classes", "box"),
    task_output_dims=(10, 4),
    routing_kinds=("learned", "learned"),
    learning_rate=3e-3,
)


@dataclass(frozen=True)
class Rows:
    """Images (B, 3, 32, 32) float32, 0 to 1, and targets by task: digit (B,) int64, box (B, 4) float32."""

    x: torch.Tensor
    targets: dict[str, torch.Tensor]


def placed(digits: NDArray[np.float64], labels: NDArray[np.int64], seed: int) -> Rows:
    """Lays every digit (B, 8, 8), ink 0 to 1, on an image of its own."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0.0, 0.2, (len(digits), 3, SIDE, SIDE))
    boxes = np.zeros((len(digits), 4))
    for row, digit in enumerate(digits):
        side = int(rng.integers(24, 29))
        nearest = np.arange(side) * 8 // side
        ink = digit[np.ix_(nearest, nearest)]
        top, left = rng.integers(0, SIDE - side + 1, 2)
        colour = rng.uniform(0.6, 1.0, (3, 1, 1))
        spot = images[row, :, top : top + side, left : left + side]
        spot += ink * (colour - spot)  # no ink leaves the noise, full ink is the colour
        lines, columns = np.nonzero(ink.any(axis=1))[0], np.nonzero(ink.any(axis=0))[0]
        boxes[row] = (
            left + columns[0],
            top + lines[0],
            left + columns[-1] + 1,
            top + lines[-1] + 1,
        )
    return Rows(
        torch.from_numpy(images.astype(np.float32)),
        {
            "digit": torch.from_numpy(labels.astype(np.int64)),
            "box": torch.from_numpy((boxes / SIDE).astype(np.float32)),
        },
    )


def digit_rows() -> tuple[Rows, Rows]:
    """Training rows, every digit at several places, and held-out rows; the same ones every time."""
    images, labels = load_digits(return_X_y=True)
    digits, held_out, label, held_out_label = train_test_split(
        images.reshape(-1, 8, 8) / 16.0, labels, test_size=HELD_OUT_DIGITS, stratify=labels, random_state=SEED
    )
    training = placed(np.tile(digits, (PLACES_PER_DIGIT, 1, 1)), np.tile(label, PLACES_PER_DIGIT), seed=SEED)
    return training, placed(held_out, held_out_label, seed=SEED + 1)


def train(console: Console, training: Rows) -> SharedComponentModel:
    """Trains a new model."""
    model = new_model(CONFIG, seed=SEED)

    def report(epoch: int, loss: float) -> None:
        if epoch == 1 or epoch % 5 == 0:
            console.print(f"demo: epoch {epoch} of {EPOCHS}, loss {loss:.3f}")

    fit(
        SharedComponentTrainer(model),
        training.x,
        training.targets,
        epochs=EPOCHS,
        batch_rows=BATCH_ROWS,
        seed=SEED,
        report=report,
    )
    return model.eval()


@torch.no_grad()
def mean_routing(model: SharedComponentModel, x: torch.Tensor) -> Table:
    """How much of each task's prediction every component makes, on average."""
    table = Table(title="Mean routing weight", title_justify="left")
    table.add_column("task")
    for kind in model.config.component_kinds:
        table.add_column(kind, justify="right")
    for task, terms in model.forward_with_terms(x).items():
        table.add_row(task, *(f"{weight:.2f}" for weight in terms.routing_weights.mean(dim=0).tolist()))
    return table


def largest_differences(model: SharedComponentModel, bundle: Path, x: torch.Tensor) -> dict[str, float]:
    """By task, the largest |ONNX Runtime - torch| over all rows and outputs."""
    with torch.no_grad():
        by_torch = model(x)
    with te_runtime.load(bundle, provider="cpu") as runtime:
        by_onnx = runtime.predict(x.numpy())
    return {
        task: float(np.abs(by_onnx[task].output - by_torch[task].numpy()).max()) for task in CONFIG.task_names
    }


def main(folder: Path) -> None:
    """Trains, saves, measures, exports, and compares."""
    console = Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    training, held_out = digit_rows()
    console.print(
        f"demo: training {len(CONFIG.component_kinds)} components on {len(training.x)} images of digits; "
        f"{len(held_out.x)} of other digits held out"
    )
    began_s = time.perf_counter()
    model = train(console, training)
    checkpoint = folder / "model.pt"
    save_checkpoint(checkpoint, model, epoch=EPOCHS)
    console.print(f"demo: trained in {time.perf_counter() - began_s:.1f} s, wrote {checkpoint}")
    measured = evaluate(model, held_out.x, held_out.targets)
    console.print(
        f"demo: held out, digit accuracy {measured['digit']:.1%}, mean overlap of the boxes (intersection over "
        f"union) {measured['box']:.2f}"
    )
    console.print(mean_routing(model, held_out.x))
    bundle = folder / "model-onnx"
    te_export.export(checkpoint, bundle, te_export.ExportOptions(force=True))
    for task, difference in largest_differences(model, bundle, held_out.x).items():
        console.print(
            f"demo: {task}: ONNX Runtime is within {difference:.1e} of torch on every held-out image"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

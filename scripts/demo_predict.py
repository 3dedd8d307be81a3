"""Predicts the demo's held-out digits from the bundle with ONNX Runtime, beside torch's predictions of them.

Never imports torch, and fails if anything it imports does.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import te_runtime


@dataclass(frozen=True)
class Comparison:
    """One task on the held-out rows, ONNX Runtime beside torch.

    Attributes:
        torch_accuracy, onnx_accuracy: share of rows whose arg-max is the label, 0 to 1.
        rows_that_differ: rows where the two arg-maxes differ.
        max_difference: largest absolute difference between two predictions, in the units of the prediction.
    """

    task: str
    classes: int
    torch_accuracy: float
    onnx_accuracy: float
    rows_that_differ: int
    max_difference: float


def compare(
    task: str, *, labels: NDArray[np.generic], by_torch: NDArray[np.generic], by_onnx: NDArray[np.generic]
) -> Comparison:
    """Labels (B,) int64, and float32 predictions (B, classes) of torch and of ONNX Runtime."""
    torch_classes, onnx_classes = by_torch.argmax(axis=1), by_onnx.argmax(axis=1)
    difference = np.abs(by_torch.astype(np.float64) - by_onnx.astype(np.float64))
    return Comparison(
        task=task,
        classes=by_torch.shape[1],
        torch_accuracy=float((torch_classes == labels).mean()),
        onnx_accuracy=float((onnx_classes == labels).mean()),
        rows_that_differ=int((torch_classes != onnx_classes).sum()),
        max_difference=float(difference.max()),
    )


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """Every array of an .npz file, by name."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def compare_all(folder: Path, bundle: Path) -> list[Comparison]:
    """Predicts the held-out rows of `folder` from `bundle`, and compares every task."""
    x = read_arrays(folder / "held-out.npz")["x"]
    by_torch = read_arrays(folder / "torch-predictions.npz")
    labels = read_arrays(folder / "held-out-labels.npz")
    with te_runtime.load(bundle, provider="cpu") as model:
        predictions = model.predict(x)
    return [
        compare(task, labels=labels[task], by_torch=by_torch[task], by_onnx=prediction.output)
        for task, prediction in predictions.items()
    ]


def table_of(comparisons: list[Comparison], rows: int) -> Table:
    """The comparisons, a line per task."""
    table = Table(title=f"Accuracy on {rows} held-out digits", title_justify="left")
    table.add_column("task", no_wrap=True)
    for heading in ("classes", "torch", "ONNX Runtime", "arg-max differs", "max |diff|"):
        table.add_column(heading, justify="right")
    for each in comparisons:
        table.add_row(
            each.task,
            str(each.classes),
            f"{each.torch_accuracy:.2%}",
            f"{each.onnx_accuracy:.2%}",
            f"{each.rows_that_differ} rows",
            f"{each.max_difference:.1e}",
        )
    return table


def next_steps(folder: Path, bundle: Path) -> str:
    """What a person may try after the demo."""
    return f"""Try next:
  .venv/bin/te-runtime inspect {bundle}
  .venv/bin/te-runtime verify {bundle}
  .venv/bin/te-runtime run {bundle} {folder / "held-out.npz"}

  import numpy as np, te_runtime                  # in .venv/bin/python
  x = np.load("{folder / "held-out.npz"}")["x"][:1]
  with te_runtime.load("{bundle}", provider="cpu") as model:
      out = model.predict(x)["digit"]             # out.output (1, 10), out.routing_weights (1, 6)"""


def main(folder: Path, bundle: Path) -> None:
    """Compares, prints, and makes sure that torch was never imported."""
    console = Console(highlight=False)
    console.print(
        f"demo: predicting from {bundle} with ONNX Runtime, in a process without torch", soft_wrap=True
    )
    comparisons = compare_all(folder, bundle)
    if "torch" in sys.modules:
        sys.exit("demo: torch was imported while predicting: te_runtime must run without it")
    rows = len(read_arrays(folder / "held-out.npz")["x"])
    console.print(table_of(comparisons, rows))
    console.print(next_steps(folder, bundle), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

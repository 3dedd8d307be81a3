"""Writes what the scheduler is measured on: R as a bundle in float32 and static int8, and a naive export of each task.

    python scripts/scheduler_subjects.py FOLDER

A process of its own, so that torch is not in the one that measures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from benchmark_precision import FEW, check_form, int8_options, write_rows
from reference_graphs import export_naive, make_model

import te_export


def write_subjects(folder: Path) -> None:
    """Everything into a folder, the bundle last."""
    torch.set_num_threads(1)
    model = make_model(FEW)
    for task in range(FEW):
        export_naive(model, folder / f"naive-task_{task}.onnx", task=task)
    torch.save(model.state_dict(), folder / "model.pt")
    result = te_export.export(folder / "model.pt", folder / "bundle", int8_options(write_rows(folder)))
    check_form(result, "static")


if __name__ == "__main__":
    write_subjects(Path(sys.argv[1]))

"""Measures what the exact rewrites gain when graphs run: one task and all tasks, against a naive export.

naive       torch.onnx.export of one task, as it comes, with a dynamic batch axis
captured    one task / all tasks of a bundle made with optimize="none"
rewritten   the same with optimize="exact"
roof        one Gemm with the weight bytes of naive: what reading them and multiplying once costs

Graphs take turns, as interleaved_calls.py says. Medians with the span from the 10th to the 90th percentile, and
ratios of medians to naive; the whole is repeated, because a busy machine slows naive down more than the rest.
Prints Markdown; `--json FILE` keeps every sample.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import onnxruntime
import torch
from interleaved_calls import BATCH_SIZES, Measured, measure
from reference_graphs import export_naive, make_model, write_roof

import te_export


def make_graphs(folder: Path, tasks: int) -> dict[str, Path]:
    """Export everything that is compared; the paths by name."""
    model = make_model(tasks)
    torch.save(model.state_dict(), folder / "model.pt")
    export_naive(model, folder / "naive.onnx")
    written = {}
    for level in ("none", "exact"):
        options = te_export.ExportOptions(optimize=level)
        written[level] = te_export.export(folder / "model.pt", folder / level, options)
    costs = written["exact"].rewrites.costs
    write_roof(folder / "roof.onnx", costs[-1].before.weight_bytes)
    for cost in costs:
        before, after = cost.before, cost.after
        print(
            f"{tasks} tasks, {cost.graph}: {before.node_count} to {after.node_count} nodes, "
            f"{before.multiply_adds:,} to {after.multiply_adds:,} multiply-adds per row, "
            f"{before.weight_bytes:,} to {after.weight_bytes:,} weight bytes"
        )
    return {
        "naive": folder / "naive.onnx",
        "one task, captured": folder / "none/fp32/task-task_0.onnx",
        "one task, rewritten": folder / "exact/fp32/task-task_0.onnx",
        f"{tasks} tasks, captured": folder / "none/fp32/joint.onnx",
        f"{tasks} tasks, rewritten": folder / "exact/fp32/joint.onnx",
        "roof": folder / "roof.onnx",
    }


def show(found: Sequence[Measured]) -> None:
    """A row for each graph and batch size; the ratio of every repetition, so that one sees whether they agree."""
    print("\n| graph | rows | median µs (10% to 90%), of the last | over naive, by repetition |")
    print("|---|---|---|---|")
    for name in dict.fromkeys(entry.graph for entry in found):
        for batch in BATCH_SIZES:
            own = [entry for entry in found if (entry.graph, entry.batch) == (name, batch)]
            naive = [entry for entry in found if (entry.graph, entry.batch) == ("naive", batch)]
            ratios = [a.percentile(50) / b.percentile(50) for a, b in zip(own, naive, strict=True)]
            last = own[-1]
            print(
                f"| {name} | {batch} | {last.percentile(50):.0f} ({last.percentile(10):.0f} to "
                f"{last.percentile(90):.0f}) | {', '.join(f'{ratio:.2f}' for ratio in ratios)} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default="5", help="how many tasks, such as 5,20,100")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="per repetition and batch size")
    parser.add_argument("--json", type=Path, help="where to keep every sample")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, one thread; {versions}\n")
    everything: list[Measured] = []
    for tasks in (int(part) for part in arguments.tasks.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            found = measure(
                make_graphs(Path(folder), tasks),
                repetitions=arguments.repetitions,
                seconds=arguments.seconds,
                tasks=tasks,
            )
        show(found)
        everything += found
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(entry) for entry in everything]))


if __name__ == "__main__":
    main()

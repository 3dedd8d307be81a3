"""Measures what the exact rewrites gain when graphs run: one task and all tasks, against a naive export.

naive       torch.onnx.export of one task, as it comes, with a dynamic batch axis
captured    one task / all tasks of a bundle made with optimize="none"
rewritten   the same with optimize="exact"
roof        one Gemm with the weight bytes of naive: what reading them and multiplying once costs

All sessions are open in one process, with one thread, and take turns in an order drawn anew for each round. A
turn is two calls to bring a graph's weights back into the caches and then a few that are timed one by one.
Medians with the span from the 10th to the 90th percentile, and ratios of medians to naive; the whole is
repeated, because a busy machine slows naive down more than the rest. Prints Markdown; `--json FILE` keeps
every sample.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import te_export
from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel

INPUT_DIM = 784
OUTPUTS = (10, 5, 3, 7, 4)
WARM_CALLS = 2
TIMED_CALLS = 6


@dataclass(frozen=True)
class Measured:
    """Timed calls of one graph at one batch size in one repetition."""

    tasks: int
    repetition: int
    batch: int
    graph: str
    samples_us: list[float]

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.samples_us, percent))


class OneTask(torch.nn.Module):
    """What a person without te-export exports: the first task."""

    def __init__(self, model: TaskExpertModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = self.model(x, 0)[0]
        return prediction


def export_naive(model: TaskExpertModel, path: Path) -> None:
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            OneTask(model).eval(),
            (torch.zeros(2, INPUT_DIM),),
            path,
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: batch},),
        )


def write_roof(path: Path, weight_bytes: int) -> None:
    """One Gemm whose weight has as many bytes."""
    rows = weight_bytes // 4 // INPUT_DIM
    weight = np.random.default_rng(0).standard_normal((rows, INPUT_DIM)).astype(np.float32) / 28
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
        "roof",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", INPUT_DIM])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", rows])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(rows, np.float32), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def make_graphs(folder: Path, tasks: int) -> dict[str, Path]:
    """Export everything that is compared; the paths by name."""
    torch.manual_seed(0)
    outputs = tuple((OUTPUTS * -(-tasks // len(OUTPUTS)))[:tasks])
    model = TaskExpertModel(TaskExpertConfig(num_tasks=tasks, task_output_dims=outputs)).eval()
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


def open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def time_calls(
    sessions: Mapping[str, onnxruntime.InferenceSession],
    feeds: Mapping[str, Mapping[str, NDArray[np.float32]]],
    *,
    seconds: float,
    rng: random.Random,
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    order = list(sessions)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        rng.shuffle(order)
        for name in order:
            session, feed = sessions[name], feeds[name]
            for _ in range(WARM_CALLS):
                session.run(None, feed)
            for _ in range(TIMED_CALLS):
                begun = time.perf_counter_ns()
                session.run(None, feed)
                samples[name].append((time.perf_counter_ns() - begun) / 1e3)
    return samples


def measure(paths: Mapping[str, Path], arguments: argparse.Namespace, tasks: int) -> list[Measured]:
    sessions = {name: open_session(path) for name, path in paths.items()}
    rng = random.Random(0)
    found = []
    for repetition in range(arguments.repetitions):
        for batch in (1, 8, 64):
            x = np.random.default_rng(batch).standard_normal((batch, INPUT_DIM)).astype(np.float32)
            feeds = {name: {session.get_inputs()[0].name: x} for name, session in sessions.items()}
            samples = time_calls(sessions, feeds, seconds=arguments.seconds, rng=rng)
            found += [Measured(tasks, repetition, batch, name, times) for name, times in samples.items()]
    return found


def show(found: Sequence[Measured]) -> None:
    """A row for each graph and batch size; the ratio of every repetition, so that one sees whether they agree."""
    print("\n| graph | rows | median µs (10% to 90%), of the last | over naive, by repetition |")
    print("|---|---|---|---|")
    for name in dict.fromkeys(entry.graph for entry in found):
        for batch in (1, 8, 64):
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
            found = measure(make_graphs(Path(folder), tasks), arguments, tasks)
        show(found)
        everything += found
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(entry) for entry in everything]))


if __name__ == "__main__":
    main()

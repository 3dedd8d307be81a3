"""Measures what lower precision gains when graphs run: one task and all tasks, against a naive export in float32.

naive       torch.onnx.export of one task, as it comes, with a dynamic batch axis
fp32        one task / all tasks of a bundle
static      int8 with ranges from data, made with 1,024 standard normal rows
dynamic     int8 made without data
int4        made without data
roof        one layer of as many weight bytes as the one-task graph beside it: what reading them and multiplying
            once costs, in float32 one Gemm, in int8 one convolution

Graphs take turns, as interleaved_calls.py says. A ratio is taken within a round, of the round's medians; shown are
the median over all rounds with the 10th and the 90th percentile, and the median of each repetition: those of a busy
machine differ. 100 tasks are held against 5 by what they multiply: a ratio of at most 1 says that a task more
costs no more time than its multiply-adds. Prints Markdown; `--json FILE` keeps every sample.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from interleaved_calls import BATCH_SIZES, Measured, measure
from numpy.typing import NDArray
from reference_graphs import INPUT_DIM, export_naive, make_model, write_int8_roof, write_roof

import te_export
from te_export.rewrite.graph_cost import measure_cost

CALIBRATION_ROWS = 1024
FEW, MANY = 5, 100
Row = tuple[str, str, str]
LATENCY_TARGETS = {
    "one task, fp32": (0.78, 0.83, 0.90),
    "five tasks, fp32": (1.05, 1.12, 1.15),
    "one task, static": (0.36, 0.28, 0.26),
    "five tasks, static": (0.45, 0.36, 0.33),
}
TIMED_MANY = ("fp32", "static")
ROOF_TARGET = 1.10
SIZE_TARGET = 0.30


@dataclass(frozen=True)
class Made:
    """What one number of tasks gave.

    Attributes:
        paths: graphs to time, by name.
        multiply_adds: of one row through the joint fp32 graph.
        size_ratios: bytes of a variant's folder over those of fp32's, by name.
    """

    paths: Mapping[str, Path]
    multiply_adds: int
    size_ratios: Mapping[str, float]


def make_few(folder: Path) -> Made:
    """R with five tasks: everything that is compared."""
    model = make_model(FEW)
    torch.save(model.state_dict(), folder / "model.pt")
    export_naive(model, folder / "naive.onnx")
    static, dynamic = export_both(folder)
    tasks = {
        "fp32": static.bundle / "fp32",
        "static": static.bundle / "int8",
        "dynamic": dynamic.bundle / "int8",
        "int4": dynamic.bundle / "int4",
    }
    write_roof(folder / "roof.onnx", weight_bytes(tasks["fp32"]))
    write_int8_roof(folder / "int8-roof.onnx", weight_bytes(tasks["static"]))
    return Made(
        paths={
            "naive": folder / "naive.onnx",
            "roof, fp32": folder / "roof.onnx",
            "roof, static": folder / "int8-roof.onnx",
            **{f"one task, {name}": path / "task-task_0.onnx" for name, path in tasks.items()},
            **{f"five tasks, {name}": path / "joint.onnx" for name, path in tasks.items()},
        },
        multiply_adds=measure_cost(ir.load(tasks["fp32"] / "joint.onnx").graph).multiply_adds,
        size_ratios={
            name: folder_bytes(path) / folder_bytes(tasks["fp32"])
            for name, path in tasks.items()
            if name != "fp32"
        },
    )


def make_many(folder: Path, few: Mapping[str, Path]) -> Made:
    """R with a hundred tasks: the joint graphs, and beside them those of `few`."""
    torch.save(make_model(MANY).state_dict(), folder / "model.pt")
    rows = write_rows(folder)
    result = te_export.export(folder / "model.pt", folder / "static", int8_options(rows))
    check_form(result, "static")
    return Made(
        paths={
            **{f"five tasks, {name}": path for name, path in few.items()},
            "hundred tasks, fp32": result.bundle / "fp32/joint.onnx",
            "hundred tasks, static": result.bundle / "int8/joint.onnx",
        },
        multiply_adds=measure_cost(ir.load(result.bundle / "fp32/joint.onnx").graph).multiply_adds,
        size_ratios={},
    )


def export_both(folder: Path) -> tuple[te_export.ExportResult, te_export.ExportResult]:
    """With data, and without."""
    checkpoint = folder / "model.pt"
    static = te_export.export(checkpoint, folder / "static", int8_options(write_rows(folder)))
    options = te_export.ExportOptions(precisions=("fp32", "int8", "int4"))
    dynamic = te_export.export(checkpoint, folder / "dynamic", options)
    check_form(static, "static")
    check_form(dynamic, "dynamic")
    return static, dynamic


def int8_options(rows: Path) -> te_export.ExportOptions:
    """No budget: R has random weights, so that its arg-max is a matter of luck."""
    return te_export.ExportOptions(precisions=("fp32", "int8"), calibration_data=rows, max_accuracy_drop=100)


def write_rows(folder: Path) -> Path:
    x = np.random.default_rng(0).standard_normal((CALIBRATION_ROWS, INPUT_DIM), dtype=np.float32)
    np.savez(folder / "rows.npz", x=x)
    return folder / "rows.npz"


def check_form(result: te_export.ExportResult, form: str) -> None:
    found = [summary.form for summary in result.variants if summary.precision == "int8"]
    if found != [form] or result.failed_variants:
        raise SystemExit(
            f"int8 came out as {found}, expected {form}: {result.failed_variants or result.notes}"
        )


def weight_bytes(folder: Path) -> int:
    """What the graph of one task reads."""
    return measure_cost(ir.load(folder / "task-task_0.onnx").graph).weight_bytes


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


class Ratios:
    """Latencies of graphs over one another's, within rounds."""

    def __init__(self, found: Sequence[Measured]) -> None:
        self._found = found

    def of(self, graph: str, over: str, batch: int, *, scale: float = 1.0) -> str:
        """`0.36 (0.34 to 0.40); 0.35, 0.36, 0.36`: over all rounds, and the median of each repetition."""
        repetitions = [above / below * scale for above, below in self._rounds(graph, over, batch)]
        low, median, high = np.percentile(np.concatenate(repetitions), (10, 50, 90))
        each = ", ".join(f"{np.median(ratios):.2f}" for ratios in repetitions)
        return f"{median:.2f} ({low:.2f} to {high:.2f}); {each}"

    def median_us(self, graph: str, batch: int) -> str:
        samples = np.concatenate([entry.samples_us for entry in self._of(graph, batch)])
        low, median, high = np.percentile(samples, (10, 50, 90))
        return f"{median:.0f} µs ({low:.0f} to {high:.0f})"

    def _rounds(
        self, graph: str, over: str, batch: int
    ) -> Iterable[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        for above, below in zip(self._of(graph, batch), self._of(over, batch), strict=True):
            yield above.by_round(), below.by_round()

    def _of(self, graph: str, batch: int) -> list[Measured]:
        return [entry for entry in self._found if (entry.graph, entry.batch) == (graph, batch)]


def latency_rows(few: Made, ratios: Ratios) -> Iterator[Row]:
    for batch in BATCH_SIZES:
        yield f"naive, B={batch}", "—", ratios.median_us("naive", batch)
    for graph in (name for name in few.paths if name != "naive"):
        targets = LATENCY_TARGETS.get(graph, (None,) * len(BATCH_SIZES))
        for batch, target in zip(BATCH_SIZES, targets, strict=True):
            shown = "—" if target is None else f"{target:.2f}"
            yield f"{graph}, over naive, B={batch}", shown, ratios.of(graph, "naive", batch)


def roof_rows(ratios: Ratios) -> Iterator[Row]:
    for name in ("fp32", "static"):
        for batch in BATCH_SIZES:
            target = f"{ROOF_TARGET:.2f}" if (name, batch) == ("fp32", 1) else "—"
            found = ratios.of(f"one task, {name}", f"roof, {name}", batch)
            yield f"one task, {name}, over its roof, B={batch}", target, found


def scaling_rows(few: Made, many: Made, ratios: Ratios) -> Iterator[Row]:
    more = many.multiply_adds / few.multiply_adds
    for name in TIMED_MANY:
        for batch in BATCH_SIZES:
            what = f"{MANY} tasks over {FEW}, {name}: time over multiply-adds ({more:.2f} times), B={batch}"
            found = ratios.of(f"hundred tasks, {name}", f"five tasks, {name}", batch, scale=1 / more)
            yield what, "1.00", found


def size_rows(few: Made) -> Iterator[Row]:
    for name, ratio in few.size_ratios.items():
        target = "—" if name == "int4" else f"{SIZE_TARGET:.2f}"
        yield f"bytes of {name} over those of fp32", target, f"{ratio:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="per repetition and batch size")
    parser.add_argument("--json", type=Path, help="where to keep every sample")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "few").mkdir()
        (Path(folder) / "many").mkdir()
        few = make_few(Path(folder) / "few")
        many = make_many(
            Path(folder) / "many", {name: few.paths[f"five tasks, {name}"] for name in TIMED_MANY}
        )
        # Apart, since the weights of a hundred tasks would sweep the others' out of the caches.
        found, found_many = (
            measure(made.paths, repetitions=arguments.repetitions, seconds=arguments.seconds, tasks=tasks)
            for made, tasks in ((few, FEW), (many, MANY))
        )
    versions = f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}"
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, one thread, load {load:.1f}; {versions}\n")
    print("| what | target, at most | found: median (10% to 90%); of each repetition |\n| --- | --- | --- |")
    ratios = Ratios(found)
    for row in (
        *latency_rows(few, ratios),
        *roof_rows(ratios),
        *scaling_rows(few, many, Ratios(found_many)),
        *size_rows(few),
    ):
        print("| " + " | ".join(row) + " |")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(entry) for entry in (*found, *found_many)]))


if __name__ == "__main__":
    main()

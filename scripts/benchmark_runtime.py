"""Measures te_runtime against ONNX Runtime used bare: start, overhead, memory, threads, growth.

Everything that is compared is interleaved in one run. Prints a Markdown table; `--json FILE` keeps every sample.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime
from benchmark_export import NAIVE, interleave, make_checkpoint, paired_ratio, run
from numpy.typing import NDArray
from onnxruntime import InferenceSession

import te_runtime

Row = tuple[str, str, str]
Samples = dict[str, list[float]]

BARE = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {session.get_inputs()[0].name: np.zeros((1, 784), dtype=np.float32)})
"""

FIRST = """
import sys
import numpy as np
import te_runtime
model = te_runtime.load(sys.argv[1], threads=1, check=sys.argv[2])
model.predict(np.zeros((1, 784), dtype=np.float32), tasks=["task_0"])
"""

MEMORY = """
import sys
import numpy as np
import te_runtime
def pss():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) * 1024
with te_runtime.load(sys.argv[2], threads=1) as small:
    small.predict(np.zeros((1, *small.inputs[0].shape[1:]), dtype=np.float32))
before = pss()
model = te_runtime.load(sys.argv[1], threads=1, mode=sys.argv[3])
for tasks in {"all": [None], "one": [["task_0"]], "each": [*([task] for task in model.tasks), None]}[sys.argv[4]]:
    model.predict(np.zeros((1, 784), dtype=np.float32), tasks)
print(pss() - before)
"""

GROWTH = """
import sys
import numpy as np
import onnxruntime
import te_runtime
def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
model = te_runtime.load(sys.argv[1], threads=1, mode="joint")
x = np.zeros((1, *model.inputs[0].shape[1:]), dtype=np.float32)
if sys.argv[3] == "predict":
    call = lambda: model.predict(x)
else:  # what onnxruntime does by itself
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = sys.argv[1] + "/" + model.plan.graphs[0]
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    call = lambda: session.run(None, {"x": x})
for number in range(int(sys.argv[2])):
    call()
    if number == 10_000:
        before = rss()
print(rss() - before)
"""

SMALL = """
import sys, torch
from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel
torch.manual_seed(0)
config = TaskExpertConfig(
    input_dim=16, backbone_dim=8, expert_dim=4, num_experts=8, num_tasks=5, task_output_dims=(10, 5, 3, 7, 4)
)
torch.save(TaskExpertModel(config).state_dict(), sys.argv[1])
"""


@dataclass(frozen=True)
class Subjects:
    """What is measured: bundles of R and of a small model, and R's first task as torch exports it."""

    r: Path
    small: Path
    naive: Path


def make_subjects(folder: Path) -> Subjects:
    r, small = make_checkpoint(folder / "r.pt", tasks=5), folder / "small.pt"
    run([sys.executable, "-c", SMALL, str(small)])
    for checkpoint in (r, small):
        output = checkpoint.with_suffix(".onnx-bundle")
        run([sys.executable, "-m", "te_export.cli", str(checkpoint), "-o", str(output), "-q"])
    naive = folder / "naive.onnx"
    run([sys.executable, "-c", NAIVE, str(r), str(naive)])
    return Subjects(r.with_suffix(".onnx-bundle"), small.with_suffix(".onnx-bundle"), naive)


def keep_bytecode(folder: Path) -> None:
    """Have processes compile Python once, as an installed package is, whatever this environment says."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")


def spread(values: list[float], digits: int = 2) -> str:
    """Median, and the 10th and 90th of 100."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return (
        f"{statistics.median(ordered):.{digits}f} ({low:.{digits}f} to {high:.{digits}f}, n={len(ordered)})"
    )


def rows_for(model: te_runtime.Model, count: int) -> NDArray[np.float32]:
    features = [axis for axis in model.inputs[0].shape[1:] if isinstance(axis, int)]
    return np.random.default_rng(0).standard_normal((count, *features), dtype=np.float32)


def measure_start(subjects: Subjects, runs: int, samples: Samples) -> list[Row]:
    python = sys.executable
    timed = interleave(
        {
            "import onnxruntime": [python, "-c", "import onnxruntime"],
            "import te_runtime": [python, "-c", "import te_runtime"],
            "import te_runtime and load": [python, "-c", "import te_runtime; te_runtime.load"],
            "bare, naive graph": [python, "-c", BARE, str(subjects.naive)],
            "te_runtime, check=full": [python, "-c", FIRST, str(subjects.r), "full"],
            "te_runtime, check=size": [python, "-c", FIRST, str(subjects.r), "size"],
        },
        runs,
    )
    samples |= {name: [one.seconds for one in own.samples] for name, own in timed.items()}
    found = [
        ("`import te_runtime` over `import onnxruntime`", "1.15", "import te_runtime", "import onnxruntime"),
        ("the same once `te_runtime.load` was named", "1.15", "import te_runtime and load", "import onnxruntime"),
        ("fresh process to first prediction over bare onnxruntime on one naive task graph", "1.3",
         "te_runtime, check=full", "bare, naive graph"),
        ("the same with check=\"size\"", "1.3", "te_runtime, check=size", "bare, naive graph"),
    ]  # fmt: skip
    return [
        (what, target, f"{paired_ratio(timed[above], timed[below])}; {timed[above].spread()}")
        for what, target, above, below in found
    ]


def measure_overhead(bundle: Path, name: str, calls: int, samples: Samples) -> list[Row]:
    """predict and the session.run calls that it takes, in turn; both follow the other's sweep of the caches."""
    rows = []
    modes: tuple[te_runtime.Mode, ...] = ("joint", "split")
    for mode in modes:
        model, bare = load_and_keep_sessions(bundle, mode)
        with model:
            x = rows_for(model, 1)
            over, under = [], []
            for _ in range(calls):
                over.append(time_each_us(partial(model.predict, x), 1))
                under.append(time_each_us(partial(run_bare, bare, x), 1))
        extra = [a - b for a, b in zip(over, under, strict=True)][calls // 10 :]
        samples[f"overhead, {name}, {mode}, µs"] = extra
        shown = f"{spread(extra, 1)} µs; {statistics.median(under):.0f} µs beneath"
        rows.append((f"predict over the session.run calls beneath, B=1, {name}, {mode}", "8 µs", shown))
    return rows


def load_and_keep_sessions(
    bundle: Path, mode: te_runtime.Mode
) -> tuple[te_runtime.Model, list[InferenceSession]]:
    """A model, and the sessions that it runs for all tasks, in the order of its plan."""
    opened: dict[str, InferenceSession] = {}

    def keep(path: str, *arguments: object, **options: object) -> InferenceSession:
        opened[path] = InferenceSession(path, *arguments, **options)
        return opened[path]

    with mock.patch.object(onnxruntime, "InferenceSession", keep):
        model = te_runtime.load(bundle, threads=1, mode=mode)
        model.prepare()
    paths = [str(bundle / path) for path in model.plan.graphs]
    return model, [opened[path] for path in paths if path in opened]


def run_bare(sessions: list[InferenceSession], x: NDArray[np.float32]) -> None:
    """The first session on x, and the others, which are tails if there are any, on what it gave."""
    first, *tails = sessions
    given = first.run(None, {"x": x})
    for tail in tails:
        tail.run(None, {"expert_features": given[0]})


def measure_modes(bundle: Path, rounds: int, samples: Samples) -> list[Row]:
    """One task through split over its task graph, and all tasks through split over the joint graph."""
    modes: tuple[te_runtime.Mode, ...] = ("joint", "split", "task")
    models = {mode: te_runtime.load(bundle, threads=1, mode=mode) for mode in modes}
    rows = []
    for batch, repeats in ((1, 40), (8, 20), (64, 5)):
        x = rows_for(models["joint"], batch)
        cases: dict[str, Callable[[], object]] = {
            f"{mode} {which} B={batch}": partial(model.predict, x, tasks)
            for mode, model in models.items()
            for which, tasks in (("one", ["task_0"]), ("all", None))
            if (mode, which) != ("task", "all")  # which would let go of the task graph
        }
        for _ in range(rounds):
            for name, call in cases.items():
                samples.setdefault(f"{name}, µs", []).append(time_each_us(call, repeats))
        for what, target, above, below in (
            ("one task, split over task", "1.10", "split one", "task one"),
            ("all tasks, split over joint", "1.05", "split all", "joint all"),
            ("one task, joint over task", "—", "joint one", "task one"),
        ):
            over, under = (samples[f"{name} B={batch}, µs"] for name in (above, below))
            ratios = [a / b for a, b in zip(over, under, strict=True)]
            rows.append((f"{what}, B={batch}", target, f"{spread(ratios)}; {statistics.median(over):.0f} µs"))
    for model in models.values():
        model.close()
    return rows


def time_each_us(call: Callable[[], object], repeats: int) -> float:
    call()
    begun = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - begun) / repeats / 1e3


def measure_memory(subjects: Subjects, runs: int, samples: Samples) -> list[Row]:
    cases = (
        ("joint", "all", "all tasks asked for", "1.10"),
        ("split", "all", "all tasks asked for", "1.10"),
        ("split", "one", "one task asked for", "1.10"),
        ("split", "each", "each task alone and all asked for", "—"),
        ("task", "one", "one task asked for", "1.10"),
        ("task", "all", "all tasks asked for", "1.10"),
        ("task", "each", "each task alone and all asked for", "1.10"),
    )
    for _ in range(runs):
        for mode, asked, _, _ in cases:
            found = printed(MEMORY, subjects.r, subjects.small, mode, asked)
            samples.setdefault(f"PSS, {mode}, {asked}, bytes", []).append(found)
    joint = samples["PSS, joint, all, bytes"]
    rows = []
    for mode, asked, told, target in cases:
        own = samples[f"PSS, {mode}, {asked}, bytes"]
        ratios = [a / b for a, b in zip(own, joint, strict=True)]
        shown = f"{spread(ratios)}; {statistics.median(own) / 1e6:.1f} MB"
        rows.append((f"PSS, {mode}, {told}, over one joint session", target, shown))
    return rows


def measure_threads(bundle: Path, rounds: int, samples: Samples) -> list[Row]:
    rows = []
    with te_runtime.load(bundle, threads=1) as model:
        for batch in (1, 8):
            x = rows_for(model, batch)
            ratios = samples[f"2 threads over 1, B={batch}"] = []
            for _ in range(rounds):
                one, two = (calls_per_second(model, x, count) for count in (1, 2))
                ratios.append(two / one)
            what = f"throughput of 2 threads on one model over one thread's, B={batch}"
            rows.append((what, "at least 1.8", spread(ratios)))
    return rows


def calls_per_second(
    model: te_runtime.Model, x: NDArray[np.float32], threads: int, seconds: float = 0.5
) -> float:
    stop_at = time.perf_counter() + seconds
    counts = [0] * threads

    def call(place: int) -> None:
        while time.perf_counter() < stop_at:
            model.predict(x)
            counts[place] += 1

    callers = [threading.Thread(target=call, args=(place,)) for place in range(threads)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return sum(counts) / seconds


def measure_growth(bundle: Path, predictions: int, samples: Samples) -> list[Row]:
    grown = {what: printed(GROWTH, bundle, predictions, what) for what in ("predict", "session.run")}
    samples |= {f"growth, {what}, bytes": [found] for what, found in grown.items()}
    shown = f"{grown['predict'] / 1024:.0f} KiB; bare session.run {grown['session.run'] / 1024:.0f} KiB"
    return [(f"RSS growth from call 10,000 to {predictions:,}, small model, joint", "0", shown)]


def printed(code: str, *arguments: object) -> float:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="counted runs of each process")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds of calls within a process")
    parser.add_argument(
        "--predictions", type=int, default=1_000_000, help="predictions to look for growth in"
    )
    parser.add_argument("--json", type=Path, help="write every sample here")
    arguments = parser.parse_args()
    samples: Samples = {}
    with tempfile.TemporaryDirectory() as folder:
        keep_bytecode(Path(folder))
        subjects = make_subjects(Path(folder))
        rows = measure_start(subjects, arguments.runs, samples)
        rows += measure_overhead(subjects.small, "small model", 5_000, samples)
        rows += measure_overhead(subjects.r, "R", 2_000, samples)
        rows += measure_modes(subjects.r, arguments.rounds, samples)
        rows += measure_memory(subjects, max(3, arguments.runs // 3), samples)
        rows += measure_threads(subjects.r, max(3, arguments.rounds // 3), samples)
        rows += measure_growth(subjects.small, arguments.predictions, samples)
    cpu, loads = platform.processor() or platform.machine(), os.getloadavg()
    print(f"{cpu}, {os.cpu_count()} CPUs, Python {platform.python_version()}, load {loads[0]:.1f}\n")
    print("| what | target, at most | found: median (10% to 90%) |\n| --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(samples, indent=1))


if __name__ == "__main__":
    main()

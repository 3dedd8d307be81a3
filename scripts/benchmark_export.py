"""Measures what exporting costs: time, memory and bytes, against torch.onnx.export of one task as it comes.

Whole processes, interleaved, medians with spread. Prints a Markdown table; `--json FILE` keeps every sample.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

NAIVE = """
import sys, torch
from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel
config = TaskExpertConfig(num_tasks=5, task_output_dims=(10, 5, 3, 7, 4))
model = TaskExpertModel(config)
model.load_state_dict(torch.load(sys.argv[1], weights_only=True))
class OneTask(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x):
        return self.model(x, 0)[0]
batch = torch.export.Dim("batch")
torch.onnx.export(
    OneTask(model).eval(), (torch.zeros(2, 784),), sys.argv[2], dynamo=True, verbose=False, dynamic_shapes=({0: batch},)
)
"""

MAKE = """
import sys, torch
from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel
tasks, width = int(sys.argv[2]), int(sys.argv[3])
outputs = tuple(([10, 5, 3, 7, 4] * tasks)[:tasks])
torch.manual_seed(0)
config = TaskExpertConfig(
    num_tasks=tasks, task_output_dims=outputs, backbone_dim=512 * width, expert_dim=128 * width
)
torch.save(TaskExpertModel(config).state_dict(), sys.argv[1])
"""


@dataclass
class Sample:
    """One run of one process."""

    seconds: float
    peak_rss_bytes: int


@dataclass
class Measured:
    """Samples of one command; the first, warm-up, run is not among them."""

    name: str
    samples: list[Sample] = field(default_factory=list)

    def median_seconds(self) -> float:
        return statistics.median(sample.seconds for sample in self.samples)

    def spread(self) -> str:
        times = [sample.seconds for sample in self.samples]
        return f"{self.median_seconds():.2f} s ({min(times):.2f} to {max(times):.2f}, n={len(times)})"


def run(command: list[str]) -> Sample:
    """Run one process to its end; its own peak resident memory, mapped file pages included."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}:\n{errors[-2000:]}")
    return Sample(seconds=seconds, peak_rss_bytes=usage.ru_maxrss * 1024)


def interleave(commands: dict[str, list[str]], runs: int) -> dict[str, Measured]:
    """Each command once to warm up, then all in turn, `runs` times."""
    measured = {name: Measured(name) for name in commands}
    for turn in range(runs + 1):
        for name, command in commands.items():
            sample = run(command)
            if turn:
                measured[name].samples.append(sample)
    return measured


def paired_ratio(above: Measured, below: Measured) -> str:
    ratios = sorted(a.seconds / b.seconds for a, b in zip(above.samples, below.samples, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def export_command(checkpoint: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "te_export.cli", str(checkpoint), "-o", str(output), "--force", "-q"]


def make_checkpoint(path: Path, *, tasks: int, width: int = 1) -> Path:
    subprocess.run([sys.executable, "-c", MAKE, str(path), str(tasks), str(width)], check=True)
    return path


def folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def rms_ratios(bundle: Path, checkpoint: Path) -> dict[str, float]:
    """RMS error of the bundle over torch float32's own, on 2,000 standard normal rows, per task."""
    import numpy as np

    import te_runtime
    from te_export.checkpoint import read_checkpoint
    from te_export.models.input_rows import InputRows
    from te_export.models.task_expert_checkpoint import load_task_expert
    from te_export.verify.oracle import evaluate_float32, evaluate_float64

    model = load_task_expert(read_checkpoint(checkpoint), task_names=None, tasks=None)
    (spec,) = model.inputs
    x = np.random.default_rng(7).standard_normal((2_000, *spec.shape), dtype=np.float32)
    rows = InputRows({spec.name: x})
    oracle = evaluate_float64(model.module, rows)[1::2]
    single = evaluate_float32(model.module, rows, np.array_split(np.arange(len(x)), 32))[1::2]
    with te_runtime.load(bundle, provider="cpu") as loaded:
        found = loaded.predict(x)
    return {
        name: float(
            np.sqrt(np.mean((found[name].output.astype(np.float64) - exact) ** 2))
            / np.sqrt(np.mean((torchs - exact) ** 2))
        )
        for name, exact, torchs in zip(model.task_names, oracle, single, strict=True)
    }


def measure(
    folder: Path, *, runs: int, large: bool
) -> tuple[list[tuple[str, str, str]], dict[str, Measured]]:
    """Rows of (target, asked, found), and the samples behind them."""
    five = make_checkpoint(folder / "five.pt", tasks=5)
    fifty = make_checkpoint(folder / "fifty.pt", tasks=50)
    naive = [sys.executable, "-c", NAIVE, str(five), str(folder / "naive.onnx")]
    timed = interleave({"naive": naive, "five": export_command(five, folder / "five")}, runs)
    timed |= interleave(
        {
            "five again": export_command(five, folder / "again"),
            "fifty": export_command(fifty, folder / "fifty"),
        },
        max(2, runs // 2),
    )
    timed |= interleave({"help": [sys.executable, "-m", "te_export.cli", "--help"]}, runs)
    manifest = json.loads((folder / "five" / "manifest.json").read_text())
    size = sum(path.stat().st_size for path in (folder / "five").rglob("*") if path.is_file())
    ratios = rms_ratios(folder / "five", five)
    same = folder_digest(folder / "five") == folder_digest(folder / "again")
    rows = [
        ("bundle bytes over parameter bytes", "1.05", f"{size / manifest['model']['parameter_bytes']:.3f}"),
        ("te-export of R over naive torch.onnx.export of one task, whole processes", "1.5",
         f"{paired_ratio(timed['five'], timed['naive'])}; {timed['five'].spread()} over {timed['naive'].spread()}"),
        ("50 tasks over 5 tasks", "2.5", f"{paired_ratio(timed['fifty'], timed['five again'])}; {timed['fifty'].spread()}"),
        ("same bytes from two folders and processes", "yes", "yes" if same else "NO"),
        ("RMS error over torch float32's own, 2,000 rows, median over tasks", "1.5",
         f"{statistics.median(ratios.values()):.2f} ({min(ratios.values()):.2f} to {max(ratios.values()):.2f})"),
        ("te-export --help", "0.3 s", timed["help"].spread()),
    ]  # fmt: skip
    if large:
        rows += measure_large(folder, timed)
    return rows, timed


def measure_large(folder: Path, timed: dict[str, Measured]) -> list[tuple[str, str, str]]:
    """200 tasks, and a 2 GB checkpoint: once each, since they take minutes."""
    many = make_checkpoint(folder / "many.pt", tasks=200)
    big = make_checkpoint(folder / "big.pt", tasks=5, width=13)
    timed["two hundred"] = Measured("two hundred", [run(export_command(many, folder / "many"))])
    timed["two gigabytes"] = Measured("two gigabytes", [run(export_command(big, folder / "big"))])
    peak, size = timed["two gigabytes"].samples[0].peak_rss_bytes, big.stat().st_size
    return [
        ("200 tasks", "works", f"works, {timed['two hundred'].spread()}"),
        (f"peak memory over the size of a {size / 1e9:.2f} GB checkpoint", "2.5",
         f"{peak / size:.2f} ({peak / 1e9:.2f} GB; {timed['two gigabytes'].spread()})"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each short command")
    parser.add_argument("--large", action="store_true", help="also 200 tasks and a 2 GB checkpoint (minutes)")
    parser.add_argument("--json", type=Path, help="write every sample here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, timed = measure(Path(folder), runs=arguments.runs, large=arguments.large)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}\n"
    )
    print("| what | target, at most | found |\n| --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({name: asdict(value) for name, value in timed.items()}, indent=1)
        )


if __name__ == "__main__":
    main()

"""The command `te-runtime bench` on a tiny bundle, in runs of fractions of a second."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from te_runtime.bench_clock import LocalClock
from te_runtime.bench_memory import read_pss_bytes
from te_runtime.bench_progress import NoProgress, TerminalProgress, choose_progress
from te_runtime.bench_rows import cut_queries, read_bench_rows
from te_runtime.cli import main
from te_runtime.predictor import Model

QUICK = ("--duration", "0.05", "--threads", "1")


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["bench", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "Traceback" not in result.output
    return result


def told(*arguments: object) -> Any:
    result = call(*arguments, "--json")
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert found["exit_code"] == result.exit_code
    return found


def test_one_bundle_in_a_pipe(pristine: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "te_runtime", "bench", str(pristine), *QUICK],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")  # no progress in a pipe
    for part in (
        f"{pristine}, fp32 on cpu",
        "mode         split, 3 graphs",
        "single-stream: ",
        "\noffline: ",
    ):
        assert part in done.stdout
    assert "\r" not in done.stdout


def test_every_scenario_as_json(pristine: Path) -> None:
    scenarios = [f"--scenario={name}" for name in ("server", "offline", "multi-stream", "single-stream")]
    found = told(pristine, *QUICK, *scenarios, "--p99-ms", 1000, "--batch", "3,20", "--mode", "joint")
    assert found["status"] == "ok"
    steps = [(result["scenario"], result["rows_per_call"]) for result in found["results"]]
    assert steps == [
        ("single-stream", 1),
        ("multi-stream", 8),
        ("offline", 3),
        ("offline", 20),
        ("server", 1),
    ]
    assert found["results"][-1]["server"]["rate_per_s"] > 0
    for result in found["results"]:
        (measured,) = result["bundles"]
        assert measured["samples_ns"]
        assert measured["latency_ms"]["p50"] > 0
    (bundle,) = found["bundles"]
    assert (bundle["plan"]["mode"], bundle["precision"], bundle["ran_on"]) == ("joint", "fp32", "cpu")
    assert found["settings"]["rows"] == {"group": "ordinary", "count": 5}
    assert found["settings"]["tasks"] == ["task_0", "task_1"]


def test_only_some_tasks_are_predicted(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[tuple[str, ...]] = set()
    real = Model.predict

    def predict(self: Model, x: Any, tasks: Any = None) -> Any:
        asked.add(tuple(tasks))
        return real(self, x, tasks)

    monkeypatch.setattr(Model, "predict", predict)
    found = told(pristine, *QUICK, "--task", "task_1", "--scenario", "single-stream")
    assert (asked, found["settings"]["tasks"]) == ({("task_1",)}, ["task_1"])


def test_two_bundles(pristine: Path, bundle: Path) -> None:
    result = call(pristine, *QUICK, "--compare", bundle, "--scenario", "single-stream")
    assert result.exit_code == 0
    for part in (f"A: {pristine}", f"B: {bundle}", "  A over B ", "ratios of the two halves differ by "):
        assert part in result.stdout


def test_two_bundles_with_different_inputs(pristine: Path, tiny: ModuleType, tmp_path: Path) -> None:
    tiny.write_tiny_bundle(tmp_path / "wide", two_inputs=True)
    result = call(pristine, *QUICK, "--compare", tmp_path / "wide")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the other bundle reads x float32 (batch, 6), z float32 (batch, 2), this one x" in result.stderr


def test_two_bundles_with_different_tasks(pristine: Path, tiny: ModuleType, tmp_path: Path) -> None:
    tiny.write_tiny_bundle(tmp_path / "other", outputs={"task_1": 2, "third": 2})
    result = call(pristine, *QUICK, "--compare", tmp_path / "other")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the other bundle has no task 'task_0'; its tasks are task_1, third." in result.stderr
    both = ("--task", "task_1", "--scenario", "single-stream")
    assert call(pristine, *QUICK, "--compare", tmp_path / "other", *both).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "int8"), "precision of this bundle: found 'int8', expected 'fp32'"),
        (("--task", "tsk_1"), "did you mean 'task_1'?"),
        (("--duration", "nan"), "--duration: found nan"),
        (
            ("--scenario", "server", "--p99-ms", "0.0001"),
            "cannot be held at any rate: one query at a time takes",
        ),
        (("--compare", "/no/such/bundle"), "no such folder"),
        (("--mode", "pruned"), "no pruned graph"),
        (("--device", "1"), "--device 1 names a GPU, but the provider is cpu"),
        (("--seed", "-1"), "'--seed'"),
    ],
)
def test_what_cannot_be_measured_is_refused(pristine: Path, arguments: tuple[str, ...], message: str) -> None:
    result = call(pristine, *QUICK, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert told(pristine, *QUICK, *arguments)["status"] == "error"


INTERRUPTED = """
import os, signal, sys
from te_runtime import entry, predictor
real, calls = predictor.Model.predict, 0
def predict(self, x, tasks=None):
    global calls
    calls += 1
    if calls == 1200:  # after the warm-up, which ends at 1,000
        os.kill(os.getpid(), signal.SIGINT)
    return real(self, x, tasks)
predictor.Model.predict = predict
entry.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals, as on Linux and macOS")
@pytest.mark.parametrize("form", ["text", "json"])
def test_ctrl_c_prints_what_it_has(pristine: Path, form: str) -> None:
    arguments = ["bench", str(pristine), "--duration", "30", *(["--json"] if form == "json" else [])]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *arguments], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, "")
    if form == "json":
        found = json.loads(done.stdout)
        assert (found["status"], found["exit_code"], found["interrupted"]) == ("interrupted", 130, True)
        (result,) = found["results"]
        assert (result["scenario"], result["interrupted"]) == ("single-stream", True)
        assert 100 < result["bundles"][0]["calls"] < 1200
    else:
        assert done.stdout.startswith("INTERRUPTED: this is what was measured until then.")
        assert "single-stream: one row after another (interrupted)" in done.stdout


def test_queries_go_through_the_rows_in_order(pristine: Path) -> None:
    rows = read_bench_rows(pristine, None)
    x = rows.feeds["x"]
    assert [len(cut_queries(rows, size)) for size in (1, 2, 5, 8)] == [5, 2, 1, 1]
    np.testing.assert_array_equal(cut_queries(rows, 2)[1]["x"], x[2:4])
    np.testing.assert_array_equal(cut_queries(rows, 8)[0]["x"], x[[0, 1, 2, 3, 4, 0, 1, 2]])


def test_pss_where_linux_tells_it(tmp_path: Path) -> None:
    rollup = tmp_path / "smaps_rollup"
    assert read_pss_bytes(rollup) is None
    rollup.write_text(
        "5581-7ffc ---p 00000000 00:00 0  [rollup]\nRss:  2000 kB\nPss:  1500 kB\nPss_Anon: 9 kB\n"
    )
    assert read_pss_bytes(rollup) == 1_536_000
    rollup.write_text("Rss:  2000 kB\n")
    assert read_pss_bytes(rollup) is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_of_a_terminal() -> None:
    assert isinstance(choose_progress(io.StringIO()), NoProgress)
    stream = Terminal()
    progress = choose_progress(stream)
    assert isinstance(progress, TerminalProgress)
    progress.show("single-stream", 0.5)
    progress.show("x" * 200, 1.0)
    progress.clear()
    _, first, second, blank, end = stream.getvalue().split("\r")
    assert first.rstrip() == "[##########----------]  50% single-stream"
    assert len(first) == len(second) == len(blank) == 79
    assert (blank.strip(), end) == ("", "")


def test_the_clock_waits_and_never_for_what_has_passed() -> None:
    clock = LocalClock()
    clock.wait_until(clock.wall_ns() - 10**12)
    moment = clock.wall_ns() + 3_000_000
    clock.wait_until(moment)
    assert clock.wall_ns() >= moment
    assert clock.cpu_ns() > 0

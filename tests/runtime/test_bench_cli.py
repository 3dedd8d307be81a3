"""The command `te-runtime bench` on a tiny bundle, in runs of fractions of a second."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from te_runtime.bench_clock import LocalClock
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
        "mode         split, 4 graphs",
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
    for part in (f"A: {pristine}", f"B: {bundle}", "  A over B ", " the ratios of 10 parts are "):
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


def test_queries_go_through_the_rows_in_order(pristine: Path) -> None:
    rows = read_bench_rows(pristine, None)
    x = rows.feeds["x"]
    assert [len(cut_queries(rows, size)) for size in (1, 2, 5, 8)] == [5, 2, 1, 1]
    np.testing.assert_array_equal(cut_queries(rows, 2)[1]["x"], x[2:4])
    np.testing.assert_array_equal(cut_queries(rows, 8)[0]["x"], x[[0, 1, 2, 3, 4, 0, 1, 2]])


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


def on_terminal(
    columns: int, *arguments: object, folder: Path | None = None, term: str = "xterm"
) -> tuple[int, str]:
    """Exit code, and everything that a terminal of so many columns was sent."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "TERM")}
    with subprocess.Popen(
        [sys.executable, "-m", "te_runtime", "bench", *map(str, arguments)],
        stdout=theirs,
        stderr=theirs,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env={**kept, "TERM": term},
    ) as process:
        os.close(theirs)
        sent = bytearray()
        with contextlib.suppress(OSError):  # how Linux tells that the other end is closed
            while block := os.read(ours, 65536):
                sent += block
    os.close(ours)
    return process.returncode, sent.decode().replace("\r\n", "\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX terminals, as on Linux and macOS")
@pytest.mark.parametrize("columns", [0, 40, 60, 200])
def test_a_terminal_of_any_width(pristine: Path, columns: int) -> None:
    exit_code, sent = on_terminal(columns, pristine.name, *QUICK, "--batch", "8", folder=pristine.parent)
    assert exit_code == 0
    assert "\x1b" not in sent
    progress, *report = [line.split("\r")[-1] for line in sent.split("\n")]
    assert max(len(part) for part in sent.split("\n")[0].split("\r")) <= (
        columns - 1 if 1 < columns < 80 else 79
    )
    assert max(map(len, report)) <= (columns if 1 < columns < 80 else 80)
    assert progress.startswith(pristine.name)
    assert ("   rows     rows/s" in sent) == (columns not in (40, 60))
    assert ("offline: calls of 8 rows, one after" in sent) == (columns in (40, 60))


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX terminals, as on Linux and macOS")
def test_a_dumb_terminal_is_shown_no_progress(pristine: Path) -> None:
    exit_code, sent = on_terminal(80, pristine, *QUICK, "--scenario", "single-stream", term="dumb")
    assert (exit_code, "\r" in sent) == (0, False)

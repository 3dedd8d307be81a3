"""Ctrl-C and SIGTERM at every stage of `te-runtime bench`: what was measured is printed, and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals, as on Linux and macOS")

STOPPED = """
import os, signal, sys
from te_runtime import bench_run, bench_subject, cli_group, entry, predictor

def stopping(real, at):
    calls = 0
    def call(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), getattr(signal, name))
        return real(*arguments, **options)
    return call

name, where, at = sys.argv[1:4]
del sys.argv[1:4]
if where == "load":
    bench_subject.load = stopping(bench_subject.load, int(at))
elif where == "trial":
    bench_run.run_trial = stopping(bench_run.run_trial, int(at))
elif where == "print":
    cli_group._write = stopping(cli_group._write, int(at))
else:
    real = stopping(predictor.Model.predict, int(at))
    predictor.Model.predict = lambda self, x, tasks=None: real(self, x, tasks)
entry.main()
"""


def stop(bundle: Path, signal: str, where: str, at: int, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a bench that is sent a signal in the `at`-th call."""
    command = [signal, where, str(at), "bench", str(bundle), "--threads", "1", *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, *command],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def told(*arguments: Any) -> Any:
    exit_code, stdout, stderr = stop(*arguments, "--json")
    assert (exit_code, stderr) == (130, "")
    found = json.loads(stdout, parse_constant=pytest.fail)
    assert (found["status"], found["exit_code"], found["interrupted"]) == ("interrupted", 130, True)
    return found


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_while_calls_are_timed(pristine: Path, signal: str) -> None:
    found = told(pristine, signal, "predict", 1200, "--duration", 30)  # the warm-up ends at 1,000
    (result,) = found["results"]
    assert (result["scenario"], result["interrupted"]) == ("single-stream", True)
    assert 100 < result["bundles"][0]["calls"] < 1200


def test_as_text(pristine: Path) -> None:
    exit_code, stdout, stderr = stop(pristine, "SIGINT", "predict", 1200, "--duration", 30)
    assert (exit_code, stderr) == (130, "")
    assert stdout.startswith("INTERRUPTED: this is what was measured until then.")
    assert "single-stream: one row after another (interrupted)" in stdout


@pytest.mark.parametrize(("at", "loaded"), [(1, 0), (2, 1)])
def test_while_loading(pristine: Path, at: int, loaded: int) -> None:
    found = told(pristine, "SIGINT", "load", at, "--compare-mode", "joint")
    assert len(found["bundles"]) == loaded
    assert found["results"] == []
    _, stdout, _ = stop(pristine, "SIGINT", "load", at, "--compare-mode", "joint")
    assert "\nNothing was measured.\nINTERRUPTED: some of what was asked for is missing.\n" in stdout
    assert ("cold start" in stdout) == (loaded == 1)


def test_while_it_warms_up(pristine: Path) -> None:
    found = told(pristine, "SIGINT", "predict", 5)  # the first one is that of the cold start
    assert (len(found["bundles"]), found["results"]) == (1, [])


def test_while_it_seeks_a_rate(pristine: Path) -> None:
    search = ("--scenario", "server", "--p99-ms", 1000, "--duration", 0.05)
    found = told(pristine, "SIGINT", "trial", 3, *search)
    (result,) = found["results"]
    assert (result["scenario"], result["bundles"]) == ("server", [])
    assert (result["server"]["rate_per_s"], len(result["server"]["trials"])) == (None, 2)


def test_while_it_prints(pristine: Path) -> None:
    exit_code, _, stderr = stop(
        pristine, "SIGINT", "print", 1, "--duration", 0.01, "--scenario", "single-stream"
    )
    assert (exit_code, stderr) == (130, "")

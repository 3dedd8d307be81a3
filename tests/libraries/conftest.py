"""An environment of its own with published multi-task libraries, and what exporting their models finds there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BIN_FOLDER = "Scripts" if os.name == "nt" else "bin"
STEP_TIMEOUT_S = 600
MODES = ("joint", "split", "task")
BATCHES = (1, 2, 7, 64)
SUM_ERROR = 1e-6
"""A softmax of a few float32 numbers: their sum rounds by a few units of 2^-24."""
ASKED_FOR = "TE_EXPORT_LIBRARIES"
LIBRARIES = (
    "torch-rechub==0.9.0",
    "LibMTL==1.1.5",
    "pandas==3.1.1",
    "tqdm==4.70.1",
    "python-dateutil==4.0.0",
)
"""The libraries, and what they import beside torch, numpy and scikit-learn, which the tests' own environment has."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "libraries" in config.option.markexpr or os.environ.get(ASKED_FOR) == "1":
        return
    skip = pytest.mark.skip(
        reason=f"takes minutes and a package index: ask with -m libraries or {ASKED_FOR}=1"
    )
    for item in items:
        if item.get_closest_marker("libraries") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def library_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees this checkout, the packages that the tests run with, and the libraries."""
    folder = tmp_path_factory.mktemp("libraries") / "venv"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=STEP_TIMEOUT_S
    )
    python = folder / BIN_FOLDER / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    done = subprocess.run(
        [*pip, "install", "-q", "--no-deps", "--only-binary", ":all:", *LIBRARIES],  # never torch
        capture_output=True,
        text=True,
        timeout=STEP_TIMEOUT_S,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"needs a machine with a package index; pip could not install the libraries: {reason}")
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    seen = (ROOT, ROOT / "runtime", sysconfig.get_paths()["purelib"])
    (Path(own) / "more-packages.pth").write_text("".join(f"{path}\n" for path in seen), encoding="utf-8")
    return python


@pytest.fixture
def export_soundly(library_python: Path, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Exports a library model and asserts what holds for every one; the answer is what the check found."""

    def run(name: str) -> dict[str, Any]:
        done = subprocess.run(
            [
                str(library_python),
                str(Path(__file__).with_name("check_library_model.py")),
                name,
                str(tmp_path),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=STEP_TIMEOUT_S,
        )
        assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
        found: dict[str, Any] = json.loads(done.stdout)
        assert found["captures"] == {"traces": 1, "graphs": 1}
        require_exact_predictions(found)
        require_found_gates(found)
        require_small_graphs(found)
        return found

    return run


@pytest.fixture
def export_by_command(library_python: Path, tmp_path: Path) -> Callable[[str, str], dict[str, Any]]:
    """Exports a library model with te-export --model, and tells how far its answers are off."""
    return lambda name, factory: run_check(library_python, "check_command.py", name, factory, tmp_path)


def run_check(python: Path, script: str, *arguments: str | Path) -> dict[str, Any]:
    """What a script of this folder printed, as JSON."""
    done = subprocess.run(
        [str(python), str(Path(__file__).with_name(script)), *map(str, arguments)],
        env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")},
        capture_output=True,
        text=True,
        timeout=STEP_TIMEOUT_S,
    )
    assert done.returncode == 0, f"{script} {arguments}\n{done.stdout}\n{done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def require_exact_predictions(found: dict[str, Any]) -> None:
    """Every graph, at every batch size, errs at most 4 times as far as torch or as its manifest allows."""
    errors = found["predictions"]
    assert {(error["task"], error["mode"], error["rows"]) for error in errors} == {
        (task, mode, rows) for task in found["tasks"] for mode in MODES for rows in BATCHES
    }
    assert [error for error in errors if not error["largest"] <= error["bound"]] == []


def require_found_gates(found: dict[str, Any]) -> None:
    """Every gate is an output, says what the library's own gate says, and a model without gates gets none."""
    optional = found["optional_gates"]
    assert set(found["gated_tasks"]) <= set(found["found_gates"]) <= {*found["gated_tasks"], *optional}
    assert {weights["task"] for weights in found["weights"]} == set(found["found_gates"])
    for weights in found["weights"]:
        assert weights["largest_sum_error"] <= SUM_ERROR
        assert weights["experts"] == optional.get(weights["task"], weights["experts"])
        if weights["task"] in found["gated_tasks"]:
            assert len(weights["errors"]) == len(MODES) * len(BATCHES)
            assert [error for error in weights["errors"] if not error["largest"] <= error["bound"]] == []


def require_small_graphs(found: dict[str, Any]) -> None:
    """A task's graph is smaller than the joint one, and no larger than what is cut out of torch's own export."""
    joint = found["joint"]["parameters"]
    for size in found["sizes"]:
        graph, extracted = size["graph"], size["extracted"]
        assert graph["parameters"] < joint or (size["needs_whole_model"] and graph["parameters"] <= joint)
        assert graph["parameters"] <= extracted["parameters"] + size["spare_numbers"], size
        assert graph["nodes"] <= extracted["nodes"], size

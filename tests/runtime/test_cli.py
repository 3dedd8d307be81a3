from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from te_runtime.cli import main


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.npz"
    np.savez(path, x=np.random.default_rng(3).normal(size=(5, 6)))
    return path


def test_help_and_version() -> None:
    text = call("--help").stdout
    assert "te-runtime inspect model-onnx" in text
    assert "Exit codes" in text
    for command in ("inspect", "verify", "run", "doctor"):
        assert call(command, "-h").exit_code == 0
    assert call("--version").stdout.startswith("te-runtime ")
    assert call("bogus").exit_code == 2


def test_inspect_tells_what_is_in_a_bundle(bundle: Path) -> None:
    result = call("inspect", bundle)
    assert result.exit_code == 0
    for part in (
        "tiny-onnx: a te-export bundle, format version 1",
        "input      x: float32 (batch, 6)",
        "task       task_1: prediction float32 (batch, 2), routing weights (batch, 3)",
        "variant    fp32: ",
        "8 rows to verify with: 5 ordinary, 3 large",
        "te-export 0.1.0, torch 2.13.0",
        "every sha256 matches",
        f"Next: te-runtime verify {bundle}",
    ):
        assert part in result.stdout


def test_inspect_as_json(bundle: Path) -> None:
    found = json.loads(call("inspect", bundle, "--json").stdout)
    assert found["checksums_match"] is True
    assert [task["name"] for task in found["tasks"]] == ["task_0", "task_1"]
    assert found["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 6]}]
    assert found["variants"][0]["worst_parity"]["bound"] > 0
    assert found["producer"]["opset"] == 17


def test_inspect_needs_no_onnxruntime(bundle: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from te_runtime.cli import main\n"
        f"main(['inspect', {str(bundle)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_verify_passes(bundle: Path) -> None:
    result = call("verify", bundle, "--threads", 1)
    assert result.exit_code == 0
    assert "8 golden rows through 7 graphs" in result.stdout
    assert "ok     task_0: worst error" in result.stdout
    assert json.loads(call("verify", bundle, "--json").stdout)["ok"] is True


def test_verify_fails_with_graph_task_row_expected_and_found(bundle: Path, tiny: ModuleType) -> None:
    tiny.edit_golden(bundle, lambda arrays: arrays["task_1.prediction"].__setitem__((2, 1), 123.0))
    result = call("verify", bundle)
    assert result.exit_code == 1
    assert "ok     task_0" in result.stdout
    assert "FAILED task_1" in result.stdout
    assert "mismatch: graph fp32/joint.onnx, task task_1, prediction, row 2, column 1" in result.stdout
    assert "expected 123, found " in result.stdout
    assert "must not be used" in result.stdout
    result = call("verify", bundle, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["ok"] is False
    assert {entry["row"] for entry in found["mismatches"]} == {2}


def test_run_writes_beside_the_input(bundle: Path, rows: Path) -> None:
    result = call("run", bundle, rows)
    assert result.exit_code == 0
    output = rows.with_name("rows-predictions.npz")
    assert "task_0: prediction (5, 2), routing weights (5, 3)" in result.stdout
    assert "… 2 more rows" in result.stdout
    assert f"Wrote {output}" in result.stdout
    with np.load(output, allow_pickle=False) as found:
        assert len(found.files) == 4
        assert found["task_1.prediction"].shape == (5, 2)
    again = call("run", bundle, rows)
    assert again.exit_code == 2
    assert again.stderr.startswith("error: ")
    assert "--force" in again.stderr
    assert call("run", bundle, rows, "--force").exit_code == 0


def test_run_some_tasks_as_json(bundle: Path, rows: Path, tmp_path: Path) -> None:
    result = call("run", bundle, rows, "--task", "task_1", "-o", tmp_path / "o.npz", "--json")
    assert json.loads(result.stdout) == {
        "output": str(tmp_path / "o.npz"),
        "provider": "cpu",
        "tasks": {"task_1": {"prediction": [5, 2], "routing_weights": [5, 3]}},
    }
    with np.load(tmp_path / "o.npz", allow_pickle=False) as found:
        assert sorted(found) == ["task_1.prediction", "task_1.routing_weights"]


def test_run_of_no_rows(bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "none.npy", np.zeros((0, 6)))
    assert "task_0: prediction (0, 2)" in call("run", bundle, tmp_path / "none.npy").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--task", "tsk_1"), 2, "did you mean 'task_1'?"),
        (("--task", "task_1", "--task", "task_1"), 2, "asked for twice"),
        (
            ("--provider", "tensorrt"),
            3,
            "provider 'tensorrt' is unknown; available: cpu, cuda, auto",
        ),
        (("--precision", "int8"), 2, "precision 'int8' is not in this bundle, which has fp32"),
        (("--threads", "0"), 2, "threads: found 0"),
        (("-o", "out.csv"), 2, "ends in .npz"),
    ],
)
def test_errors_are_one_line_on_stderr(
    bundle: Path, rows: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = call("run", bundle, rows, *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    as_json = call("run", bundle, rows, *arguments, "--json")
    assert as_json.exit_code == code
    assert message in json.loads(as_json.stdout)["error"]["message"]
    assert not rows.with_name("rows-predictions.npz").exists()


def test_v_adds_the_traceback(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "no"), "-v"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "error: " in result.stderr


def test_a_damaged_bundle_is_refused(bundle: Path, rows: Path) -> None:
    (bundle / "fp32" / "weights.bin").write_bytes(b"")
    for arguments in (("inspect", bundle), ("verify", bundle), ("run", bundle, rows)):
        result = call(*arguments)
        assert result.exit_code == 2
        assert "weights.bin: 0 bytes, expected" in result.stderr


def test_a_wrong_input_is_refused(bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "row.npy", np.zeros(6))
    result = call("run", bundle, tmp_path / "row.npy")
    assert result.exit_code == 2
    assert "for one row pass x[None, :]" in result.stderr
    assert "no such file" in call("run", bundle, tmp_path / "none.npy").stderr


def test_an_interrupt_stops_with_130(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("te_runtime.bundle.open_bundle", interrupted)
    result = call("inspect", bundle)
    assert result.exit_code == 130


def test_a_closed_pipe_gives_no_traceback(bundle: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "te_runtime", "inspect", str(bundle), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


def test_the_entry_point_is_a_click_command() -> None:
    assert isinstance(main, click.Group)
    assert sorted(main.commands) == ["doctor", "inspect", "run", "verify"]

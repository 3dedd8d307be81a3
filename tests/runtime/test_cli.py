from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from te_runtime import predictor
from te_runtime.cli import main
from te_runtime.predictor import Model, load
from te_runtime.providers import CudaOptions, ProviderChoice


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "Traceback" not in result.output
    return result


def told(*arguments: object) -> Any:
    """What --json prints: one object and nothing else, without NaN; its exit code is the process's."""
    result = call(*arguments, "--json")
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert found["exit_code"] == result.exit_code
    return found


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """te-runtime in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "te_runtime", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.npz"
    np.savez(path, x=np.random.default_rng(3).normal(size=(5, 6)))
    return path


def test_help_and_version() -> None:
    text = call("--help").stdout
    assert "te-runtime inspect model-onnx" in text
    for code in (0, 1, 2, 3, 70, 74, 130, 141):
        assert f"\n    {code:<4} " in text
    assert call("--version").stdout.startswith("te-runtime ")
    assert call("bogus").exit_code == 2


@pytest.mark.parametrize("command", [(), ("inspect",), ("verify",), ("run",), ("bench",), ("doctor",)])
def test_help_fits_80_columns(command: tuple[str, ...]) -> None:
    result = call(*command, "-h")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80


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
    found = told("inspect", bundle)
    assert found["status"] == "ok"
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
    assert f"{bundle}, fp32 on cpu: 8 golden rows through 9 graphs" in result.stdout
    assert "ok     task_0: worst error" in result.stdout
    found = told("verify", bundle)
    assert (found["status"], found["ok"]) == ("ok", True)
    assert len(found["graphs"]) == 9
    assert (found["provider"], found["gpu"]) == ("cpu", None)


def test_verify_fails_with_graph_task_row_expected_and_found(bundle: Path, tiny: ModuleType) -> None:
    tiny.edit_golden(bundle, lambda arrays: arrays["task_1.prediction"].__setitem__((2, 1), 123.0))
    result = call("verify", bundle)
    assert result.exit_code == 1
    assert "ok     task_0" in result.stdout
    assert "FAILED task_1" in result.stdout
    assert "mismatch: graph fp32/joint.onnx, task task_1, prediction, row 2, column 1" in result.stdout
    assert "expected 123, found " in result.stdout
    assert "must not be used" in result.stdout
    found = told("verify", bundle)
    assert (found["status"], found["exit_code"], found["ok"]) == ("failed", 1, False)
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
    found = told("run", bundle, rows, "--task", "task_1", "-o", tmp_path / "o.npz")
    used = found["tasks"]["task_1"].pop("utilization")
    assert found == {
        "status": "ok",
        "exit_code": 0,
        "output": str(tmp_path / "o.npz"),
        "precision": "fp32",
        "provider": "cpu",
        "gpu": None,
        "provider_asked": "cpu",
        "provider_reason": "asked for",
        "plan": {
            "mode": "split",
            "reason": found["plan"]["reason"],
            "graphs": [
                "fp32/trunk.onnx",
                "fp32/joint-tails.onnx",
                "fp32/tail-task_0.onnx",
                "fp32/tail-task_1.onnx",
            ],
        },
        "tasks": {"task_1": {"prediction": [5, 2], "routing_weights": [5, 3]}},
    }
    with np.load(tmp_path / "o.npz", allow_pickle=False) as written:
        assert sorted(written) == ["task_1.prediction", "task_1.routing_weights"]
        mean = written["task_1.routing_weights"].mean(axis=0)
    assert (used["rows"], used["rows_not_finite"]) == (5, 0)
    np.testing.assert_allclose(used["mean"], mean, rtol=1e-6)
    assert used["distance"] == pytest.approx(np.abs(mean - np.array(used["baseline"])).sum() / 2, rel=1e-6)


@pytest.mark.parametrize("mode", ["joint", "split", "task"])
def test_run_tells_which_plan_ran_and_where(bundle: Path, rows: Path, mode: str) -> None:
    result = call("run", bundle, rows, "--mode", mode)
    assert f"Ran fp32 on cpu, mode {mode}\n" in result.stdout
    assert told("run", bundle, rows, "--mode", mode, "--force")["plan"]["mode"] == mode


def test_run_tells_how_the_experts_were_used(bundle: Path, rows: Path, tmp_path: Path) -> None:
    lines = [line for line in call("run", bundle, rows).stdout.splitlines() if "mean routing" in line]
    assert len(lines) == 2
    assert all("from the baseline" in line for line in lines)
    bad = np.zeros((2, 6))
    bad[1] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    result = call("run", bundle, tmp_path / "bad.npy")
    assert "1 of 2 rows left out: not finite" in result.stdout
    used = told("run", bundle, tmp_path / "bad.npy", "--force")["tasks"]["task_0"]["utilization"]
    assert (used["rows"], used["rows_not_finite"]) == (1, 1)


def test_run_of_no_rows(bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "none.npy", np.zeros((0, 6)))
    assert "task_0: prediction (0, 2)" in call("run", bundle, tmp_path / "none.npy").stdout
    assert (
        told("run", bundle, tmp_path / "none.npy", "--force")["tasks"]["task_0"]["utilization"]["mean"]
        is None
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--task", "tsk_1"), 2, "did you mean 'task_1'?"),
        (("--task", "task_1", "--task", "task_1"), 2, "asked for twice"),
        (
            ("--provider", "tensorrt"),
            3,
            "provider: found 'tensorrt', expected 'cpu', 'cuda' or 'auto'",
        ),
        (("--precision", "int8"), 2, "precision of this bundle: found 'int8', expected 'fp32'"),
        (("-o", "out.csv"), 2, "ends in .npz"),
        (("--device", "0"), 2, "--device 0 names a GPU, but the provider is cpu: pass --provider cuda"),
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
    found = told("run", bundle, rows, *arguments)
    assert sorted(found) == ["error", "exit_code", "message", "status"]
    assert (found["status"], found["exit_code"]) == ("error", code)
    assert found["error"].endswith("Error")
    assert message in found["message"]
    assert not rows.with_name("rows-predictions.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "No such option"),
        (("bogus",), "No such command 'bogus'"),
        (("run",), "Missing argument 'BUNDLE'"),
        (("run", "b"), "Missing argument 'INPUT'"),
        (("verify", "b", "--thread", "1"), "--thread"),
        (("verify", "b", "--threads"), "--threads"),
        (("verify", "b", "--threads", "0"), "'--threads'"),
        (("verify", "b", "--threads", "1025"), "'--threads'"),
        (("verify", "b", "--threads", "two"), "'--threads'"),
        (("verify", "b", "--device", "-1"), "'--device'"),
        (("run", "b", "i", "--mode", "jiont"), "'--mode'"),
        (("doctor", "extra"), "extra"),
    ],
)
def test_wrong_usage_is_a_json_object_too(arguments: tuple[str, ...], message: str) -> None:
    found = told(*arguments)
    assert sorted(found) == ["error", "exit_code", "message", "status"]
    assert (found["status"], found["exit_code"]) == ("error", 2)
    assert message in found["message"]


def test_wrong_usage_shows_the_usage_of_the_command() -> None:
    result = call("run", "b")
    assert (result.exit_code, result.stdout) == (2, "")
    usage, hint, error = result.stderr.splitlines()
    assert usage == "Usage: main run [OPTIONS] BUNDLE INPUT"
    assert hint == "Try 'main run --help' for help."
    assert error == "error: Missing argument 'INPUT'."


def test_no_command_is_wrong_usage() -> None:
    result = call()
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error: Missing command." in result.stderr


def test_what_stands_after_two_dashes_is_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("inspect", "--", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error: --json: no such folder" in result.stderr


def test_a_defect_is_told_as_one(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> NoReturn:
        raise RuntimeError("odd")

    monkeypatch.setattr("te_runtime.bundle.open_bundle", broken)
    result = call("inspect", bundle)
    assert (result.exit_code, result.stdout) == (70, "")
    assert result.stderr.startswith("error: internal error, RuntimeError: odd. Please report it")
    assert told("inspect", bundle)["error"] == "RuntimeError"


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


def test_the_input_and_the_bundle_are_never_written_to(bundle: Path, rows: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    shutil.copy(rows, bundle / "rows.npz")
    for input_file, output in ((rows, bundle / "golden.npz"), (bundle / "rows.npz", None), (rows, rows)):
        place = () if output is None else ("-o", output)
        result = call("run", bundle, input_file, *place, "--force")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "Pass -o" in result.stderr
    (bundle / "rows.npz").unlink()
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


def test_verify_and_run_name_the_gpu(bundle: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that calls itself CUDA: the number asked for goes in, the GPU's name comes out."""
    asked: list[CudaOptions | None] = []

    def load_as_cuda(path: Path, *, provider: str, cuda: CudaOptions | None, **options: Any) -> Model:
        asked.append(cuda)
        model = load(path, **options)
        model._settings = SimpleNamespace(  # type: ignore[assignment]
            provider=ProviderChoice("auto", "cuda", "a graph ran on Test GPU", "Test GPU"),
            cuda=CudaOptions(),
            threads=1,
        )
        monkeypatch.setattr(Model, "verify", lambda self: report)
        return model

    with load(bundle) as model:
        report = model.verify()
    monkeypatch.setattr(predictor, "load", load_as_cuda)
    for command in (("verify", bundle), ("run", bundle, rows, "--force")):
        result = call(*command, "--provider", "auto", "--device", "1")
        assert "fp32 on cuda (Test GPU)" in result.stdout
        assert "provider auto took cuda: a graph ran on Test GPU" in result.stdout
        found = told(*command, "--provider", "auto")
        assert (found["provider"], found["gpu"]) == ("cuda", "Test GPU")
        assert found["provider_reason"] == "a graph ran on Test GPU"
    assert asked == [CudaOptions(1), None, CudaOptions(1), None]


def test_an_interrupt_stops_with_130(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("te_runtime.bundle.open_bundle", interrupted)
    result = call("inspect", bundle)
    assert result.exit_code == 130
    assert "error: interrupted" in result.stderr
    assert told("inspect", bundle)["exit_code"] == 130


COMMANDS = [("--help",), ("--version",), ("inspect", "{}"), ("inspect", "{}", "--json"), ("verify", "{}")]


@pytest.fixture
def closed_pipe() -> Any:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_closed_pipe_ends_quietly(pristine: Path, command: tuple[str, ...], closed_pipe: int) -> None:
    done = process(*(part.format(pristine) for part in command), stdout=closed_pipe)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_pipe_hides_no_error(tmp_path: Path, closed_pipe: int) -> None:
    done = process("inspect", tmp_path / "no", "--json", stdout=closed_pipe)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no such folder" in done.stderr


def test_a_closed_pipe_hides_no_failed_check(bundle: Path, tiny: ModuleType, closed_pipe: int) -> None:
    tiny.edit_golden(bundle, lambda arrays: arrays["task_1.prediction"].__setitem__((2, 1), 123.0))
    assert process("verify", bundle, stdout=closed_pipe).returncode == 1


needs_full_device = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has"
)


@needs_full_device
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_full_device_is_an_error(pristine: Path, command: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = process(*(part.format(pristine) for part in command), stdout=full)
    assert done.returncode == 74
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the result could not be printed: No space left on device.")


@needs_full_device
def test_an_error_that_cannot_be_told_keeps_its_exit_code(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "te_runtime", "inspect", str(tmp_path / "no"), "--json"]
        done = subprocess.run(command, stdout=full, stderr=full, timeout=60, check=False)
    assert done.returncode == 2


def test_a_closed_standard_output_is_an_error(pristine: Path) -> None:
    command = f"exec {sys.executable} -m te_runtime inspect {pristine} >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 74
    assert done.stderr.startswith("error: the result could not be printed: standard output is closed.")


def test_names_that_the_terminal_cannot_show_are_escaped(pristine: Path, tmp_path: Path) -> None:
    odd = tmp_path / "zeilen-\udcff-ä.npy"
    np.save(odd, np.zeros((1, 6)))
    done = process(
        "run", pristine, odd, stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0, done.stderr
    assert "zeilen-\\udcff-\\xe4-predictions.npz" in done.stdout


def test_the_shell_can_complete_commands() -> None:
    environment = os.environ | {"_TE_RUNTIME_COMPLETE": "zsh_source"}
    done = process(stdout=subprocess.PIPE, env=environment)
    assert done.returncode == 0, done.stderr
    assert "te-runtime" in done.stdout


def test_the_entry_point_is_a_click_command() -> None:
    assert isinstance(main, click.Group)
    assert sorted(main.commands) == ["bench", "doctor", "inspect", "run", "verify"]

"""The te-export command: exit codes, what stands on which stream, and errors on one screen."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import te_export
from te_export import cli
from te_export.errors import (
    CaptureError,
    CheckpointError,
    DependencyError,
    OutputError,
    ParityError,
    StructureError,
    UntrustedPickleError,
    UsageError,
)
from te_runtime.bundle import open_bundle
from te_runtime.errors import ProviderError

SCREEN = 25


@dataclass(frozen=True)
class Outcome:
    """What one run of the command left."""

    code: int
    out: str
    err: str

    @property
    def object(self) -> dict[str, object]:
        """The one JSON object on standard output, and nothing else there."""
        found: dict[str, object] = json.loads(self.out, parse_constant=pytest.fail)
        assert self.out.count("\n") == 1
        return found


Command = Callable[..., Outcome]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """`command("model.pt", "--json")`: te-export in this process."""
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["te-export", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        streams = capsys.readouterr()
        code = left.value.code
        assert isinstance(code, int)
        return Outcome(code, streams.out, streams.err)

    yield run
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture(scope="module")
def model_pt(exported: te_export.ExportResult) -> Path:
    """The checkpoint that `exported` was made from. Not to be changed."""
    return exported.bundle.parent / "model.pt"


@pytest.fixture
def model(model_pt: Path, tmp_path: Path) -> Path:
    """A checkpoint in a folder of its own."""
    return Path(shutil.copy(model_pt, tmp_path / "model.pt"))


@pytest.fixture
def fake_export(
    monkeypatch: pytest.MonkeyPatch, exported: te_export.ExportResult
) -> list[tuple[object, ...]]:
    """te_export.export answers at once with `exported`; the calls it got."""
    from te_export import pipeline

    calls: list[tuple[object, ...]] = []

    def export(*arguments: object) -> te_export.ExportResult:
        calls.append(arguments)
        return exported

    monkeypatch.setattr(pipeline, "export", export)
    return calls


def failing_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    from te_export import pipeline

    def export(*arguments: object) -> te_export.ExportResult:
        raise error

    monkeypatch.setattr(pipeline, "export", export)


def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What loads when

HEAVY = "{'torch', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'numpy', 'rich', 'safetensors'}"


def test_importing_te_export_loads_neither_torch_nor_onnx() -> None:
    code = f"import sys, te_export, te_export.cli; print(sorted({HEAVY} & set(sys.modules)))"

    assert in_a_process(code).strip() == "[]"


@pytest.mark.parametrize("argument", ["--help", "--version", "--bogus"])
def test_help_and_usage_errors_load_neither_torch_nor_onnx(argument: str) -> None:
    code = (
        f"import sys; sys.argv = ['te-export', {argument!r}]\n"
        "from te_export.cli import main\n"
        "try: main()\n"
        f"except SystemExit: print('loaded', sorted({HEAVY} & set(sys.modules)))"
    )

    assert in_a_process(code).strip().splitlines()[-1] == "loaded []"


def test_the_function_is_there_on_first_use() -> None:
    assert te_export.export.__module__ == "te_export.pipeline"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        te_export.nothing  # noqa: B018


# Help


def test_help_names_every_option_exit_code_and_an_example(command: Command) -> None:
    shown = command("--help")

    assert shown.code == 0
    for option in (
        "--output",
        "--task NAME",
        "--task-names",
        "--precision",
        "--opset",
        "--standalone",
        "--atol",
    ):
        assert option in shown.out
    for option in ("--rtol", "--trust-pickle", "--force", "--dry-run", "--json", "--verbose", "--quiet"):
        assert option in shown.out
    for line in ("0  done", "1  a check failed", "2  wrong usage", "3  a package"):
        assert line in shown.out
    assert "te-export model.pt" in shown.out
    assert shown.err == ""
    assert command("-h").out == shown.out


def test_version(command: Command) -> None:
    assert command("--version").out == f"te-export, version {te_export.__version__}\n"


# Success


def test_an_export_says_what_was_done_and_what_to_type_next(command: Command, model: Path) -> None:
    done = command(model)

    target = model.with_name("model-onnx")
    assert done.code == 0
    open_bundle(target)
    steps = [line.split()[0] for line in done.err.splitlines()]
    assert steps == ["read", "capture", "rewrite", "partition", "reference", "write", "verify", "publish"]
    for line in done.err.splitlines():
        assert re.search(r" \d+\.\d\d s  ", line)
    for text in ("task_0", "(batch, 4)", "max error", "vs torch", "size", "feature_fusion"):
        assert text in done.out
    assert done.out.splitlines()[-1] == f"Next:   te-runtime verify {target}"
    assert len(done.out.splitlines()) < SCREEN


def test_json_is_one_object_on_standard_output(command: Command, model: Path) -> None:
    done = command(model, "--json", "-o", model.with_name("out"))

    told = done.object
    assert done.code == 0
    assert (told["status"], told["exit_code"], told["published"]) == ("ok", 0, True)
    assert told["bundle"] == str(model.with_name("out"))
    tasks = told["tasks"]
    assert isinstance(tasks, list)
    assert [(task["name"], task["output_shape"]) for task in tasks] == [
        (f"task_{index}", ["batch", width]) for index, width in enumerate((4, 1, 4))
    ]
    assert all(task["max_abs_error"] >= 0 and task["size_bytes"] > 1000 for task in tasks)
    manifest = json.loads((model.with_name("out") / "manifest.json").read_text())
    assert told["manifest"] == manifest
    files = [path for path in model.with_name("out").rglob("*") if path.is_file()]
    assert told["size_bytes"] == sum(path.stat().st_size for path in files)
    assert "capture" in done.err


def test_dry_run_checks_everything_and_writes_nothing(command: Command, model: Path) -> None:
    done = command(model, "--dry-run", "--json", "-q")

    assert done.code == 0
    assert (done.object["status"], done.object["published"]) == ("dry-run", False)
    assert done.err == ""
    assert list(model.parent.iterdir()) == [model]


def test_a_subset_of_renamed_tasks_at_an_older_opset_standing_alone_too(
    command: Command, model: Path
) -> None:
    names = ("--task-names", "click,buy,like")

    done = command(model, *names, "--task", "like", "--task", "click", "--opset", "19", "--standalone", "-q")

    assert done.code == 0
    assert (done.out, done.err) == ("", "")
    bundle = open_bundle(model.with_name("model-onnx"))
    assert bundle.manifest.task_names == ("like", "click")
    assert bundle.manifest.producer.opset == 19
    assert sorted(path.name for path in (bundle.root / "fp32").iterdir()) == sorted(
        [f"{kind}-{task}.onnx" for kind in ("task", "tail", "standalone") for task in ("like", "click")]
        + ["joint.onnx", "joint-tails.onnx", "trunk.onnx", "weights.bin"]
    )


def test_force_replaces_a_bundle_and_without_it_nothing_is_touched(
    command: Command, model: Path, exported: te_export.ExportResult
) -> None:
    target = Path(shutil.copytree(exported.bundle, model.with_name("model-onnx")))
    before = (target / "manifest.json").read_bytes()

    refused = command(model)
    assert refused.code == 2
    assert "--force" in refused.err
    assert (target / "manifest.json").read_bytes() == before

    assert command(model, "--force", "--task", "task_1", "-q").code == 0
    assert open_bundle(target).manifest.task_names == ("task_1",)
    assert sorted(model.parent.iterdir()) == sorted([model, target])


def test_options_reach_the_library_unchanged(
    command: Command, model: Path, fake_export: list[tuple[object, ...]]
) -> None:
    done = command(
        model, "-o", "x y", "--task", "a", "--task", "b", "--task-names", "a, b,c", "--precision", "fp32,fp32",
        "--opset", "20", "--standalone", "--atol", "1e-3", "--rtol", "0", "--trust-pickle", "--force", "--dry-run",
    )  # fmt: skip

    assert done.code == 0
    ((checkpoint, output, options, _),) = fake_export
    assert (checkpoint, output) == (model, Path("x y"))
    assert options == te_export.ExportOptions(
        tasks=("a", "b"), task_names=("a", "b", "c"), precisions=("fp32",), opset=20, standalone=True, atol=1e-3,
        rtol=0.0, trust_pickle=True, force=True, dry_run=True,
    )  # fmt: skip


def test_nothing_asked_for_is_the_defaults(
    command: Command, model: Path, fake_export: list[tuple[object, ...]]
) -> None:
    command(model)

    ((_, output, options, _),) = fake_export
    assert output is None
    assert options == te_export.ExportOptions()


def test_the_next_command_can_be_pasted(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch, exported: te_export.ExportResult
) -> None:
    from te_export import pipeline

    odd = Path("/tmp/it's a; folder")
    result = te_export.ExportResult(**{**vars(exported), "bundle": odd})
    monkeypatch.setattr(pipeline, "export", lambda *arguments: result)

    line = command(model).out.splitlines()[-1]

    import shlex

    assert shlex.split(line.removeprefix("Next: ")) == ["te-runtime", "verify", str(odd)]


def test_verbose_says_which_versions(
    command: Command, model: Path, fake_export: list[tuple[object, ...]]
) -> None:
    assert "onnxruntime" in command(model, "-v").out
    assert "onnxruntime" not in command(model).out


# Errors of a person's making: exit 2, on one screen, nothing written


def damaged(state: dict[str, torch.Tensor], kind: str) -> object:
    if kind == "nan":
        state["backbone.network.3.bias"][1] = float("nan")
    elif kind == "missing":
        del state["experts.1.network.3.weight"]
    elif kind == "conflict":
        return {"state_dict": state, "config": {"num_experts": 7}}
    elif kind == "another model":
        return {"layer.weight": torch.zeros(2)}
    elif kind == "int":
        state["backbone.network.3.bias"] = torch.zeros(24, dtype=torch.int32)
    return state


BAD_FILES: dict[str, bytes] = {
    "empty": b"",
    "random": bytes(range(256)) * 9,
    "html": b"<!DOCTYPE html><html>not found</html>",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
}

BAD_ARGUMENTS: dict[str, list[str]] = {
    "no such task": ["--task", "task_9"],
    "the same task twice": ["--task", "task_0", "--task", "task_0"],
    "too few names": ["--task-names", "a,b"],
    "names that are not allowed": ["--task-names", "a,b/c,d"],
    "equal names": ["--task-names", "a,A,b"],
    "an old opset": ["--opset", "7"],
    "a future opset": ["--opset", "999"],
    "infinite tolerance": ["--atol", "inf"],
    "no tolerance": ["--rtol", "nan"],
}

BAD_USAGE: dict[str, list[str]] = {
    "empty names": ["--task-names", "a,,b"],
    "no names": ["--task-names", ""],
    "unknown precision": ["--precision", "fp32,int3"],
    "opset that is no number": ["--opset", "newest"],
    "negative tolerance": ["--atol", "-1"],
    "unknown option": ["--frce"],
    "one argument too many": ["other.pt"],
}


def assert_clear_error(done: Outcome, code: int = 2) -> None:
    assert done.code == code
    assert "error: " in done.err
    assert "Traceback" not in done.err
    assert "internal error" not in done.err
    assert len(done.err.splitlines()) < SCREEN
    told = done.object
    assert (told["status"], told["exit_code"]) == ("error", code)
    message = told["message"]
    assert isinstance(message, str)
    assert message
    assert message.splitlines()[0] in done.err


@pytest.mark.parametrize("kind", ["nan", "missing", "conflict", "another model", "int"])
def test_bad_tensors(kind: str, command: Command, model: Path) -> None:
    torch.save(damaged(torch.load(model), kind), model)

    done = command(model, "--json")

    assert_clear_error(done)
    assert done.object["error"] == "CheckpointError"
    assert list(model.parent.iterdir()) == [model]


@pytest.mark.parametrize("kind", list(BAD_FILES))
def test_files_that_are_no_checkpoints(kind: str, command: Command, model: Path) -> None:
    model.write_bytes(BAD_FILES[kind])

    done = command(model, "--json")

    assert_clear_error(done)
    assert str(model) in done.err
    assert list(model.parent.iterdir()) == [model]


@pytest.mark.parametrize("kind", list(BAD_ARGUMENTS))
def test_arguments_that_do_not_fit(kind: str, command: Command, model: Path) -> None:
    done = command(model, "--json", *BAD_ARGUMENTS[kind])

    assert_clear_error(done)
    assert done.object["error"] == "UsageError"
    assert list(model.parent.iterdir()) == [model]


@pytest.mark.parametrize("kind", list(BAD_USAGE))
def test_usage_errors(kind: str, command: Command, model: Path) -> None:
    done = command(model, "--json", *BAD_USAGE[kind])

    assert_clear_error(done)
    assert done.err.startswith("Usage: te-export [OPTIONS] CHECKPOINT")
    assert list(model.parent.iterdir()) == [model]


@pytest.mark.parametrize(
    "name", [".", "..", "/", "", "folder", "folder/", "nowhere.pt", "nowhere/model.pt", "model.pt/x"]
)
def test_checkpoints_that_are_no_files(
    name: str, command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    (model.parent / "folder").mkdir()

    done = command(name, "--json")

    assert_clear_error(done)
    assert done.object["error"] == "CheckpointError"
    assert sorted(path.name for path in model.parent.iterdir()) == ["folder", "model.pt"]


@pytest.mark.parametrize("name", [".", "..", "", "file", "nowhere/out", "x" * 300, "link"])
@pytest.mark.parametrize("force", [False, True])
def test_outputs_that_cannot_be(
    name: str, force: bool, command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    (model.parent / "file").write_text("mine")
    (model.parent / "link").symlink_to("nowhere")

    done = command(model, "--json", "-o", name, *(["--force"] if force else []))

    assert_clear_error(done)
    assert done.object["error"] == "OutputError"
    assert sorted(path.name for path in model.parent.iterdir()) == ["file", "link", "model.pt"]
    assert (model.parent / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prune-experts", "0.5"), "Add --calibration-data F.npz, or leave --prune-experts out"),
        (("--prune-experts", "-1"), "Invalid value for '--prune-experts'"),
        (("--prune-experts", "101"), "Invalid value for '--prune-experts'"),
        (("--prune-experts", "few"), "Invalid value for '--prune-experts'"),
        (("--prune-experts", "1", "--calibration-data", "no.npz"), "no.npz: no such file"),
        (("--calibration-data", "no.npz"), "Add --precision fp32,int8 or --prune-experts 0.5"),
    ],
)
def test_pruning_that_cannot_be_judged_is_refused(
    arguments: tuple[str, ...], message: str, command: Command, model: Path
) -> None:
    done = command(model, *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.out == ""


def test_no_arguments_is_a_usage_error(command: Command) -> None:
    done = command()

    assert done.code == 2
    assert "Missing argument 'CHECKPOINT'" in done.err


# Every kind of error

ERRORS: list[tuple[BaseException, int]] = [
    (UsageError("u"), 2),
    (CheckpointError("c"), 2),
    (UntrustedPickleError("p"), 2),
    (OutputError("o"), 2),
    (CaptureError("a"), 1),
    (StructureError("s"), 1),
    (ParityError("y"), 1),
    (DependencyError("d"), 3),
    (ProviderError("r"), 3),
    (KeyboardInterrupt(), 130),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: type(value).__name__)
def test_every_error_has_its_exit_code_and_its_object(
    error: BaseException, code: int, command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_with(monkeypatch, error)

    done = command(model, "--json")

    assert_clear_error(done, code)
    if str(error):
        assert done.object["error"] == type(error).__name__
        assert done.object["message"] == str(error)


@pytest.mark.parametrize("flags", [["-v"], ["--verbose"], ["-qv"], ["-vq"]])
def test_tracebacks_come_with_v_only(
    flags: list[str], command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_with(monkeypatch, CheckpointError("what went wrong"))

    assert "Traceback" in command(model, *flags).err
    for without in ([], ["-q"], ["--json"]):
        shown = command(model, *without)
        assert "Traceback" not in shown.err
        assert "error: what went wrong" in shown.err


def test_a_defect_of_ours_has_an_exit_code_of_its_own(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_with(monkeypatch, ZeroDivisionError("division by zero"))

    done = command(model, "--json")

    assert done.code not in (0, 1, 2, 3, 130)
    assert done.object["exit_code"] == done.code
    assert "internal error, ZeroDivisionError: division by zero" in done.err
    assert "Traceback" not in done.err


def test_a_gate_that_fails_exits_1_and_leaves_nothing(command: Command, model: Path) -> None:
    done = command(model, "--atol", "0", "--json")

    assert_clear_error(done, 1)
    assert done.object["error"] == "ParityError"
    assert list(model.parent.iterdir()) == [model]


@pytest.mark.parametrize("missing", ["te_export.pipeline"])
def test_a_missing_package_exits_3(
    missing: str, command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)

    done = command(model, "--json")

    assert_clear_error(done, 3)
    assert done.object["error"] == "DependencyError"
    assert "pip install" in done.err


def test_a_broken_package_exits_3(command: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    plain = builtins.__import__

    def broken(name: str, *rest: object, **options: object) -> object:
        if name == "te_export.pipeline":
            raise ImportError("libcudnn.so.9: cannot open shared object file")
        return plain(name, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", broken)

    done = command(model, "--json")

    assert_clear_error(done, 3)
    assert "libcudnn.so.9" in done.err


def test_quiet_still_prints_errors(command: Command, tmp_path: Path) -> None:
    done = command(tmp_path / "nowhere.pt", "-q")

    assert done.code == 2
    assert done.out == ""
    assert "no such file" in done.err


@pytest.mark.parametrize("name", [b"odd-\xff.pt", "it's модель [1]*?.pt".encode()])
def test_names_of_any_kind_get_an_answer(name: bytes, command: Command, model: Path) -> None:
    import os

    path = Path(os.fsdecode(os.path.join(os.fsencode(model.parent), name)))  # noqa: PTH118 - bytes
    model.rename(path)

    done = command(path, "-q")

    if b"\xff" in name:  # onnxruntime opens no such path
        assert done.code == 2
        assert list(path.parent.iterdir()) == [path]
    else:
        assert done.code == 0
        open_bundle(path.with_name(f"{path.stem}-onnx"))


def test_text_of_the_checkpoint_reaches_the_screen_without_control_characters(
    command: Command, model: Path
) -> None:
    state = torch.load(model)
    torch.save({"state_dict": state, "config": {"\x1b[31mred\n\ud800": 1, "num_experts": 3}}, model)

    done = command(model)

    assert done.code == 0
    assert "\x1b" not in done.out + done.err
    assert "\ud800" not in done.out + done.err
    report = (model.with_name("model-onnx") / "report.md").read_text("utf-8")
    assert "\x1b" not in report

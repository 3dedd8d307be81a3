"""`te-export diff`: dispatch, exit codes, text on a terminal and in a pipe, JSON, and bundles that are damaged."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

import te_export
from te_export import cli
from te_export.compare_bundles import diff
from te_export.compare_bundles.result_json import diff_object
from te_export.compare_bundles.text import diff_lines

TINY = Path(__file__).parents[1] / "runtime" / "tiny_bundle.py"


@dataclass(frozen=True)
class Outcome:
    """What one run of the command left."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    """tests/runtime/tiny_bundle.py as a module."""
    spec = importlib.util.spec_from_file_location("tiny_bundle_of_cli_diff", TINY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """`command("diff", a, b)`: te-export in this process."""
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["te-export", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        streams = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return Outcome(left.value.code, streams.out, streams.err)

    yield run
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture
def pair(tiny: ModuleType, tmp_path: Path) -> tuple[Path, Path]:
    """Two bundles with other weights."""
    for seed, name in enumerate(("a", "b")):
        tiny.write_tiny_bundle(tmp_path / name, seed=seed)
    return tmp_path / "a", tmp_path / "b"


# Which command it is


def test_diff_compares_and_a_file_called_diff_is_still_exported(
    command: Command, exported: te_export.ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(exported.bundle.parent / "model.pt", tmp_path / "diff")

    refused = command("diff")
    assert refused.code == 2
    assert refused.err.startswith("Usage: te-export diff [OPTIONS] A B\n")
    assert "Missing argument 'A'" in refused.err
    assert "te-export ./diff" in refused.err

    for arguments in (("./diff", "-o", "one", "-q"), ("-q", "-o", "two", "diff")):
        assert command(*arguments) == Outcome(0, "", "")
    assert not diff("one", "two").is_different


def test_one_bundle_alone_is_refused(command: Command, pair: tuple[Path, Path]) -> None:
    done = command("diff", pair[0], "--json")

    assert done.code == 2
    assert "Missing argument 'B'" in done.err
    assert json.loads(done.out)["exit_code"] == 2


def test_help_of_either_tells_of_diff(command: Command) -> None:
    assert "te-export diff A B" in command("--help").out
    shown = command("diff", "--help")
    assert shown.code == 0
    assert shown.out.startswith("Usage: te-export diff [OPTIONS] A B")
    for line in ("--exit-code", "--json", "--verbose", "0  compared", "1  with --exit-code"):
        assert line in shown.out
    assert command("diff", "-h").out == shown.out


def test_neither_torch_nor_onnxruntime_is_loaded(pair: tuple[Path, Path]) -> None:
    code = (
        f"import sys; sys.argv = ['te-export', 'diff', {str(pair[0])!r}, {str(pair[1])!r}]\n"
        "from te_export.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('loaded', sorted({'torch', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)

    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_the_function_is_public_and_loaded_on_first_use(pair: tuple[Path, Path]) -> None:
    found = te_export.diff(*pair)

    assert isinstance(found, te_export.BundleDiff)
    assert {"diff", "BundleDiff"} <= set(te_export.__all__)
    assert te_export.diff(str(pair[0]), os.fspath(pair[1])) == te_export.diff(*map(str, pair))


# Exit codes and streams


def test_exit_codes(command: Command, pair: tuple[Path, Path]) -> None:
    first, second = pair

    assert [command("diff", first, second, *more).code for more in ((), ("--json",), ("-v",))] == [0, 0, 0]
    assert command("diff", first, second, "--exit-code").code == 1
    assert command("diff", first, first, "--exit-code") == Outcome(0, "no differences\n", "")
    told = command("diff", first, second, "--exit-code", "--json")
    assert (told.code, json.loads(told.out)["exit_code"]) == (1, 1)


def test_json_is_one_object_with_everything(command: Command, pair: tuple[Path, Path]) -> None:
    done = command("diff", *pair, "--json")

    told: dict[str, Any] = json.loads(done.out, parse_constant=pytest.fail)
    assert done.out.count("\n") == 1
    assert done.err == ""
    assert told == json.loads(json.dumps(diff_object(diff(*map(str, pair)), exit_code=0)))
    assert (told["status"], told["different"], told["golden_is_same"]) == ("ok", True, False)
    assert told["a"]["path"] == str(pair[0])
    changed = next(weight for weight in told["weights"] if weight["name_before"] == "task_1.head.w")
    assert (changed["status"], changed["part_before"], changed["shape_after"]) == (
        "changed",
        "head of task_1",
        [4, 2],
    )
    values = changed["values"]
    assert values["changed"] == values["elements"] == 8
    assert values["relative_rms"] == pytest.approx(values["rms_difference"] / values["rms_before"])


def test_every_key_of_the_json_is_documented(pair: tuple[Path, Path]) -> None:
    documented = (Path(__file__).parents[2] / "docs" / "diff.md").read_text("utf-8")

    for key in diff_object(diff(*pair), exit_code=0):
        assert f"`{key}`" in documented


def test_a_closed_pipe_is_no_error_of_ours(pair: tuple[Path, Path]) -> None:
    code = "from te_export.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "diff", *map(str, pair), "-v"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_text_that_the_output_cannot_hold_is_escaped(tiny: ModuleType, tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        tiny.write_tiny_bundle(tmp_path / f"модель-{name}", seed=seed)
    code = "from te_export.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "diff", *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u043c\u043e\u0434" in done.stdout


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 200])
def test_lines_fit_the_terminal(
    columns: int, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))

    lines = list(diff_lines(diff(*pair), verbose=False))

    tables = [line for line in lines if line.startswith("  ")]
    assert tables
    assert max(map(len, tables)) <= max(columns, 40)


def test_control_characters_in_names_are_escaped(tiny: ModuleType, tmp_path: Path) -> None:
    odd = tmp_path / "a\x1b[31m\nb"
    tiny.write_tiny_bundle(odd)
    shutil.copytree(odd, tmp_path / "other")
    rename = {"task_0.head.w": "h\x1b[2J\u202ehead"}

    def edit(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            tensor.name = rename.get(tensor.name, tensor.name)
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                node.input[place] = rename.get(name, name)

    tiny.edit_graph(tmp_path / "other", "tail-task_0", edit)

    shown = "\n".join(diff_lines(diff(odd, tmp_path / "other"), verbose=True))

    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert r"a\x1b[31m\nb" in shown
    assert r"h\x1b[2J\u202ehead" in shown


# What cannot be compared


def change_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit in the weights": (
        lambda root: change_byte(root / "fp32/weights.bin"),
        "the file was changed",
    ),
    "a flipped bit in a graph": (lambda root: change_byte(root / "fp32/trunk.onnx"), "the file was changed"),
    "a flipped bit in the manifest": (lambda root: change_byte(root / "manifest.json"), "manifest.json"),
    "weights cut short": (lambda root: os.truncate(root / "fp32/weights.bin", 99), "99 bytes, expected"),
    "no graph": (lambda root: (root / "fp32/tail-task_0.onnx").unlink(), "no such file"),
    "no manifest": (lambda root: (root / "manifest.json").unlink(), "holds no manifest.json"),
    "nothing": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("kind", list(DAMAGES))
@pytest.mark.parametrize("first", [True, False])
def test_damaged_bundles_exit_2(kind: str, first: bool, command: Command, pair: tuple[Path, Path]) -> None:
    damage, message = DAMAGES[kind]
    damage(pair[0])

    done = command("diff", *(pair if first else pair[::-1]), "--json")

    assert done.code == 2
    assert message in done.err
    assert str(pair[0]) in done.err
    assert "Traceback" not in done.err
    assert json.loads(done.out)["error"] == "BundleError"


def external(model: onnx.ModelProto, key: str, value: str) -> None:
    tensor = next(t for t in model.graph.initializer if t.external_data)
    (pair,) = (pair for pair in tensor.external_data if pair.key == key)
    pair.value = value


CRAFTED: dict[str, Callable[[onnx.ModelProto], object]] = {
    "another file": lambda model: external(model, "location", "../golden.npz"),
    "an absolute path": lambda model: external(model, "location", "/etc/passwd"),
    "past the end": lambda model: external(model, "offset", "999999999"),
    "before the beginning": lambda model: external(model, "offset", "-8"),
    "no number": lambda model: external(model, "offset", "zero"),
    "too short": lambda model: external(model, "length", "4"),
    "a negative shape": lambda model: model.graph.initializer[0].dims.__setitem__(0, -4),
    "an unknown type": lambda model: setattr(model.graph.initializer[0], "data_type", 99),
}


@pytest.mark.parametrize("kind", list(CRAFTED))
def test_graphs_whose_weights_lie_elsewhere_are_refused(
    kind: str, command: Command, pair: tuple[Path, Path], tiny: ModuleType
) -> None:
    tiny.edit_graph(pair[0], "tail-task_1", CRAFTED[kind])

    done = command("diff", *pair)

    assert done.code == 2
    assert "fp32/tail-task_1.onnx: initializer " in done.err
    assert "Traceback" not in done.err


def test_a_graph_that_is_none_is_refused(command: Command, pair: tuple[Path, Path], tiny: ModuleType) -> None:
    (pair[1] / "fp32" / "trunk.onnx").write_bytes(b"\xff" * 50)
    tiny.rehash(pair[1])

    done = command("diff", *pair)

    assert done.code == 2
    assert "trunk.onnx: is no ONNX graph" in done.err


def test_values_that_the_graph_does_not_hold_are_refused(
    command: Command, pair: tuple[Path, Path], tiny: ModuleType
) -> None:
    def edit(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
        tensor.raw_data = b"\0" * 3

    tiny.edit_graph(pair[0], "tail-task_1", edit)

    done = command("diff", *pair)

    assert done.code == 2
    assert "values that cannot be read" in done.err


def test_an_interrupt_exits_130(
    command: Command, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from te_export import compare_bundles

    def interrupted(*_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_bundles, "diff", interrupted)

    done = command("diff", *pair)

    assert (done.code, done.out, done.err.strip()) == (130, "", "error: interrupted")


def test_a_missing_package_exits_3(
    command: Command, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "te_export.compare_bundles.text", None)

    done = command("diff", *pair, "--json")

    assert done.code == 3
    assert json.loads(done.out)["error"] == "DependencyError"

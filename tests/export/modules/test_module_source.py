"""Where modules come from: factories that the user names, weights by name, and .pt2 files."""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from te_export.checkpoint import read_checkpoint
from te_export.checkpoint.contents import Checkpoint
from te_export.errors import CheckpointError, UsageError
from te_export.modules.module_source import build_module, load_weights, read_pt2

SOURCE = """\
import torch
from torch import nn

made = nn.Linear(4, 2)
number = 3


class Model(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)


class NeedsWidth(nn.Linear):
    def __init__(self, width):
        super().__init__(width, 2)


def build():
    return Model()


def weights():
    return Model().state_dict()


def fails():
    return torch.zeros(2) @ torch.zeros(3)


def leaves():
    raise SystemExit(2)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that te-export runs in, with the package pkg in it."""
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "models.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("pkg", "script"):
            del sys.modules[name]


# Factories


@pytest.mark.parametrize("name", ["build", "Model", "made"])
def test_a_function_a_class_and_a_module_are_factories(name: str, project: Path) -> None:
    module = build_module(f"pkg.models:{name}")

    assert isinstance(module, nn.Linear)


def test_the_search_path_is_as_it_was(project: Path) -> None:
    before = list(sys.path)

    build_module("pkg.models:build")

    assert sys.path == before


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("pkg.models", "expected package.module:factory"),
        ("pkg.models:", "expected package.module:factory"),
        (":build", "expected package.module:factory"),
        ("pkg.modls:build", r"Python finds no module 'pkg.modls'.*in the folder that holds it"),
        ("no_such_package:build", "Python finds no module 'no_such_package'"),
        ("pkg.models:buidl", r"pkg.models has no 'buidl'; did you mean 'build'\?"),
        ("pkg.models:zzz", r"pkg.models has no 'zzz'$"),
        ("pkg.models:number", "number is int, expected a function or class"),
        ("pkg.models:weights", r"weights\(\) gave OrderedDict, expected a torch.nn.Module"),
        (
            "pkg.models:fails",
            r"fails\(\) fails with RuntimeError: .*models.py:27, in fails.*without arguments",
        ),
        ("pkg.models:NeedsWidth", r"NeedsWidth\(\) fails with TypeError: .*'width'.*without arguments"),
        ("pkg.models:leaves", r"leaves\(\) fails with SystemExit: 2"),
        (".models:build", "expected package.module:factory"),
    ],
)
def test_a_factory_that_gives_no_module(factory: str, message: str, project: Path) -> None:
    with pytest.raises(UsageError, match=message):
        build_module(factory)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", r"importing script fails with ZeroDivisionError.*script.py:1"),
        ("import no_such_thing", r"Python finds no module 'no_such_thing' \(script.py:1"),
        ("def broken(:", "importing script fails with SyntaxError"),
        (
            "import argparse\nargparse.ArgumentParser().parse_args(['--x'])",
            "importing script fails with SystemExit: 2",
        ),
    ],
    ids=["raises", "misses a package", "is no Python", "parses a command line"],
)
def test_code_that_cannot_be_imported(code: str, message: str, project: Path) -> None:
    (project / "script.py").write_text(code)

    with pytest.raises(UsageError, match=message):
        build_module("script:build")


# Weights


def checkpoint_of(state: dict[str, Tensor], folder: Path, **around: object) -> Checkpoint:
    torch.save({"state_dict": state, **around} if around else state, folder / "model.pt")
    return read_checkpoint(folder / "model.pt", trust_pickle=False)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() + 1 for name, tensor in module.state_dict().items()}


def test_every_tensor_goes_to_its_name(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    state = state_of(module)

    load_weights(module, checkpoint_of(state, tmp_path), "pkg:build")

    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(prefix: str, tmp_path: Path) -> None:
    module = nn.Linear(4, 3)
    state = state_of(module)
    wrapped = {prefix + name: tensor for name, tensor in state.items()}

    load_weights(module, checkpoint_of(wrapped, tmp_path), "pkg:build")

    assert torch.equal(module.weight, state["weight"])


def test_half_precision_weights_are_widened(tmp_path: Path) -> None:
    module = nn.Linear(4, 3)
    state = {name: tensor.half() for name, tensor in state_of(module).items()}

    load_weights(module, checkpoint_of(state, tmp_path), "pkg:build")

    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, state["weight"].float())


def test_a_module_built_in_half_precision_gets_the_weights_in_float32(tmp_path: Path) -> None:
    state = state_of(nn.Linear(4, 3))
    module = nn.Linear(4, 3).half()

    load_weights(module, checkpoint_of(state, tmp_path), "pkg:build")

    assert torch.equal(module.weight, state["weight"])


def test_a_module_without_values_gets_those_of_the_file(tmp_path: Path) -> None:
    state = state_of(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    module = nn.Sequential(nn.Linear(4, 3, device="meta"), nn.BatchNorm1d(3, device="meta"))

    load_weights(module, checkpoint_of(state, tmp_path), "pkg:build")

    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_module_without_shapes_gets_those_of_the_file(tmp_path: Path) -> None:
    state = state_of(nn.Linear(4, 3))
    module = nn.LazyLinear(3)

    load_weights(module, checkpoint_of(state, tmp_path), "pkg:build")

    assert torch.equal(module.weight, state["weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "1 tensors of the module are missing in the file: bias"),
        ({"gate": torch.zeros(1)}, "1 tensors of the file are unknown to the module: gate"),
        (
            {"weight": torch.zeros(3, 5)},
            r"1 tensors have another shape: weight: \[3, 5\] in the file, \[3, 4\] in the module",
        ),
        ({"bias": torch.tensor([0.0, torch.nan, 0.0])}, "1 tensors hold NaN or infinity: bias"),
        ({"bias": torch.tensor([0.0, torch.inf, 0.0])}, "1 tensors hold NaN or infinity: bias"),
    ],
    ids=["missing", "unknown", "another shape", "NaN", "infinity"],
)
def test_weights_that_do_not_fit(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    module = nn.Linear(4, 3)
    state = {name: tensor for name, tensor in {**state_of(module), **change}.items() if tensor is not None}
    before = module.weight.clone()

    with pytest.raises(CheckpointError, match=message):
        load_weights(module, checkpoint_of(state, tmp_path), "pkg:build")
    assert torch.equal(module.weight, before)


def test_every_kind_of_misfit_is_told_at_once_and_only_the_first_few(tmp_path: Path) -> None:
    module = nn.ModuleList(nn.Linear(4, 3) for _ in range(20))
    state = {"0.weight": torch.zeros(1), "extra": torch.zeros(1)}

    with pytest.raises(CheckpointError) as refusal:
        load_weights(module, checkpoint_of(state, tmp_path), "pkg:build")

    message = str(refusal.value)
    assert "39 tensors of the module are missing" in message
    assert "1 tensors of the file are unknown" in message
    assert "1 tensors have another shape" in message
    assert "model.pt: does not fit the module that pkg:build builds" in message
    assert message.count(".weight") < 10


# .pt2 files


class TwoInputs(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left - right


class OneDict(nn.Module):
    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return features["left"] - features["right"]


def save_pt2(
    module: nn.Module,
    path: Path,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any] | None = None,
    *,
    is_static: bool = False,
) -> Path:
    """Save a program whose tensors have a symbolic batch axis."""
    batch = torch.export.Dim("batch")
    given = arguments if keywords is None else keywords
    shapes = tree_map(lambda value: {0: batch} if isinstance(value, Tensor) else None, given)
    program = torch.export.export(module, arguments, keywords, dynamic_shapes=None if is_static else shapes)
    torch.export.save(program, path)
    return path


def test_a_program_and_its_example_come_back(tmp_path: Path) -> None:
    module, x = nn.Linear(4, 2), torch.randn(3, 4)
    path = save_pt2(module, tmp_path / "model.pt2", (x,))

    found, example, sha256 = read_pt2(path, trust_pickle=False)

    assert isinstance(example, tuple)
    assert torch.equal(example[0], x)
    assert torch.equal(found(x), module(x))
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_inputs_in_a_dict(tmp_path: Path) -> None:
    inputs = {"left": torch.ones(3, 1), "right": torch.zeros(3, 1)}

    found, example, _ = read_pt2(save_pt2(OneDict(), tmp_path / "m.pt2", (inputs,)), trust_pickle=False)

    assert isinstance(example, dict)
    assert list(example) == ["left", "right"]
    assert torch.equal(found(inputs), torch.ones(3, 1))


def test_inputs_by_keyword(tmp_path: Path) -> None:
    inputs = {"left": torch.ones(3, 1), "right": torch.zeros(3, 1)}

    _, example, _ = read_pt2(save_pt2(TwoInputs(), tmp_path / "m.pt2", (), inputs), trust_pickle=False)

    assert isinstance(example, dict)
    assert list(example) == ["left", "right"]


@pytest.mark.parametrize(
    "arguments", [(torch.ones(3, 1), 2.0), ([torch.ones(3, 1)], torch.ones(3, 1))], ids=["a number", "a list"]
)
def test_other_inputs_are_refused(arguments: tuple[Any, ...], tmp_path: Path) -> None:
    class Anything(nn.Module):
        def forward(self, left: Any, right: Any) -> Any:
            return (left[0] if isinstance(left, list) else left) - right

    path = save_pt2(Anything(), tmp_path / "m.pt2", arguments)

    with pytest.raises(CheckpointError, match=r"neither tensors nor one dict of tensors.*--model"):
        read_pt2(path, trust_pickle=False)


def test_a_fixed_batch_axis_is_refused(tmp_path: Path) -> None:
    path = save_pt2(nn.Linear(4, 2), tmp_path / "m.pt2", (torch.zeros(3, 4),), is_static=True)

    with pytest.raises(CheckpointError, match=r"'input' is fixed \(\(3, 4\)\).*dynamic_shapes="):
        read_pt2(path, trust_pickle=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "no zip archive"),
        (b"not a zip", "no zip archive"),
    ],
)
def test_a_file_that_is_none(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "m.pt2").write_bytes(content)

    with pytest.raises(CheckpointError, match=message):
        read_pt2(tmp_path / "m.pt2", trust_pickle=False)


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_a_damaged_file(cut: float, tmp_path: Path) -> None:
    path = save_pt2(nn.Linear(4, 2), tmp_path / "m.pt2", (torch.zeros(3, 4),))
    content = bytearray(path.read_bytes())
    at = int(cut * len(content))
    content[at : at + 40] = b"\xff" * 40
    path.write_bytes(content[:at] if cut < 0.5 else content)

    with pytest.raises(CheckpointError, match=r"m\.pt2: .*Save it again"):
        read_pt2(path, trust_pickle=False)


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
        archive.writestr("notes.txt", "nothing")

    with pytest.raises(CheckpointError, match=r"m\.pt2: .*Save it again"):
        read_pt2(tmp_path / "m.pt2", trust_pickle=False)


class Runs:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "ran"))


def with_entries(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Write an archive again, with every entry as a function makes it."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


@pytest.mark.parametrize("as_plain_pickle", [True, False])
def test_pickled_code_in_the_file_does_not_run(as_plain_pickle: bool, tmp_path: Path) -> None:
    path = save_pt2(nn.Linear(4, 2), tmp_path / "m.pt2", (torch.zeros(3, 4),))
    stream = io.BytesIO()
    torch.save(Runs(tmp_path / "ran"), stream)
    attack = pickle.dumps(Runs(tmp_path / "ran")) if as_plain_pickle else stream.getvalue()
    is_attacked: list[str] = []

    def change(name: str, content: bytes) -> bytes:
        if "sample_inputs" in name or name.endswith(".pt"):
            is_attacked.append(name)
            return attack
        return content

    with_entries(path, change)

    assert is_attacked
    with pytest.raises(CheckpointError, match=r"torch\.export\.load cannot read it"):
        read_pt2(path, trust_pickle=False)
    assert not (tmp_path / "ran").exists()

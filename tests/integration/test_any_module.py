"""Modules that other people wrote, by the te-export command: weights and the code they belong to, or a .pt2 file."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import te_runtime
from te_export import ExportOptions, cli, export
from te_export.errors import UsageError
from te_runtime.bundle import open_bundle

SOURCE = '''\
import torch
from torch import nn

USERS, DENSE, EXPERTS = 20, 4, 3


class Mmoe(nn.Module):
    """Two tasks over an embedded id and dense features, in a tuple."""

    def __init__(self):
        super().__init__()
        self.users = nn.Embedding(USERS, 8)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8 + DENSE, 128), nn.ReLU(), nn.Linear(128, 128)) for _ in range(EXPERTS)
        )
        self.gates = nn.ModuleList(nn.Linear(8 + DENSE, EXPERTS) for _ in range(2))
        self.towers = nn.ModuleList(nn.Linear(128, 3) for _ in range(2))

    def forward(self, user, dense):
        x = torch.cat([self.users(user), dense], 1)
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        return tuple(
            tower((torch.softmax(gate(x), 1).unsqueeze(2) * experts).sum(1))
            for gate, tower in zip(self.gates, self.towers)
        )


def build():
    torch.manual_seed(1)
    return Mmoe()
'''
TASKS = ("click", "buy")
WEIGHTS, CODE, EXAMPLE = ("weights.pt",), ("--model", "pkg.mod:build"), ("--example-input", "sample.npz")
NAMES = ("--task-names", ",".join(TASKS))
SMALL_ERROR = 1e-5
"""Of outputs of size one from a few layers of 128 float32 numbers."""
SCREEN = 25
Inputs = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Project:
    """Someone's folder: pkg/mod.py, weights.pt, sample.npz and data.npz.

    Attributes:
        module: with the weights of weights.pt, which are not those that build() begins with.
    """

    folder: Path
    module: nn.Module

    def answers(self, inputs: Inputs) -> dict[str, NDArray[np.float32]]:
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        with torch.no_grad():
            return dict(zip(TASKS, (out.numpy() for out in self.module(**tensors)), strict=True))


def rows(count: int, seed: int) -> dict[str, NDArray[np.generic]]:
    rng = np.random.default_rng(seed)
    return {
        "user": rng.integers(0, 20, count),
        "dense": rng.standard_normal((count, 4)).astype(np.float32),
    }


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """`command("weights.pt", "--json")`: te-export in the project's folder, in this process."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.chdir(project.folder)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["te-export", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        streams = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return Outcome(left.value.code, streams.out, streams.err)

    yield run
    for name, handler in handlers.items():
        signal.signal(name, handler)
    for name in [name for name in sys.modules if name.partition(".")[0] == "pkg"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("project")
    (folder / "pkg").mkdir()
    (folder / "pkg" / "__init__.py").write_text("")
    path = folder / "pkg" / "mod.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("someones_mod", path)
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    torch.manual_seed(7)
    module: nn.Module = code.Mmoe().eval()
    torch.save(module.state_dict(), folder / "weights.pt")
    np.savez(folder / "sample.npz", **rows(6, 0))  # type: ignore[arg-type]
    return Project(folder, module)


@pytest.fixture(scope="module")
def bundle(project: Project) -> Path:
    """The module's bundle, standalone graphs included, by a process of its own. Not to be changed."""
    command = [sys.executable, "-W", "error", "-c", "from te_export.cli import main; main()"]
    arguments = [*WEIGHTS, "-o", "bundle", *CODE, *EXAMPLE, *NAMES, "--standalone"]
    done = subprocess.run(
        [*command, *arguments], cwd=project.folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return project.folder / "bundle"


def test_the_bundle_answers_what_the_module_does(project: Project, bundle: Path) -> None:
    inputs = rows(9, 1)
    with te_runtime.load(bundle, threads=1) as model:
        found = model.predict(inputs)

    for task, expected in project.answers(inputs).items():
        np.testing.assert_allclose(found[task].output, expected, rtol=0, atol=SMALL_ERROR)
        weights = found[task].routing_weights
        assert weights is not None
        assert weights.shape == (9, 3)


def test_standalone_graphs_need_nothing_beside_them(project: Project, bundle: Path, tmp_path: Path) -> None:
    inputs = rows(4, 2)
    for task, expected in project.answers(inputs).items():
        (source,) = (
            path for path in bundle.rglob("*.onnx") if "standalone" in str(path) and task in path.name
        )
        alone = tmp_path / source.name
        alone.write_bytes(source.read_bytes())
        session = onnxruntime.InferenceSession(alone, providers=["CPUExecutionProvider"])
        (found,) = session.run(["prediction"], inputs)
        np.testing.assert_allclose(found, expected, rtol=0, atol=SMALL_ERROR)


def test_one_task(project: Project, command: Command) -> None:
    inputs = rows(4, 3)

    done = command(*WEIGHTS, "-o", "one", *CODE, *EXAMPLE, *NAMES, "--task", "buy")

    assert done.code == 0, done.err
    with te_runtime.load(project.folder / "one", threads=1) as model:
        found = model.predict(inputs)

    assert list(found) == ["buy"]
    np.testing.assert_allclose(found["buy"].output, project.answers(inputs)["buy"], rtol=0, atol=SMALL_ERROR)


def test_int8_of_a_module_of_two_inputs(project: Project, command: Command) -> None:
    data = rows(256, 4)
    labels = {f"labels.{task}": out.argmax(1) for task, out in project.answers(data).items()}
    np.savez(project.folder / "data.npz", **data, **labels)  # type: ignore[arg-type]

    done = command(
        *WEIGHTS, "-o", "int8", *CODE, *EXAMPLE, *NAMES, "--precision", "fp32,int8", "--calibration-data", "data.npz",
        "--max-accuracy-drop", "5",
    )  # fmt: skip

    assert done.code == 0, done.err
    bundle = project.folder / "int8"
    assert [variant.precision for variant in open_bundle(bundle).manifest.variants] == ["fp32", "int8"]
    held_out = rows(200, 5)
    with te_runtime.load(bundle, precision="int8", threads=1) as model:
        found = model.predict(held_out)
    for task, expected in project.answers(held_out).items():
        assert (found[task].output.argmax(1) == expected.argmax(1)).mean() >= 0.9


class Dense(nn.Module):
    """A .pt2 file holds the code: nothing of this class is needed to read it."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.head(torch.relu(self.bottom(features["left"] - features["right"])))
        return found


def test_a_pt2_file_needs_neither_code_nor_examples(project: Project, command: Command) -> None:
    torch.manual_seed(3)
    module, batch = Dense().eval(), torch.export.Dim("batch")
    features = {name: torch.randn(5, 4) for name in ("left", "right")}
    shapes = {"features": {"left": {0: batch}, "right": {0: batch}}}
    torch.export.save(
        torch.export.export(module, (features,), dynamic_shapes=shapes), project.folder / "dense.pt2"
    )

    done = command("dense.pt2", "-o", "dense", *NAMES, "--json")

    assert done.code == 0, done.err
    assert json.loads(done.out)
    with te_runtime.load(project.folder / "dense", threads=1) as model:
        found = model.predict({name: tensor.numpy() for name, tensor in features.items()})
    with torch.no_grad():
        expected = module(features).numpy()
    for column, task in enumerate(TASKS):
        np.testing.assert_allclose(
            found[task].output, expected[:, column : column + 1], rtol=0, atol=SMALL_ERROR
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*CODE,), "needs example inputs"),
        ((*CODE, "--example-input", "none.npz"), "none.npz: no such file"),
        ((*CODE, "--example-input", "weights.pt"), "numpy.savez"),
        ((*EXAMPLE,), "--model"),
        (("--model", "pkg.mod:buid", *EXAMPLE), "did you mean 'build'?"),
        (("--model", "pkg.nothing:build", *EXAMPLE), "Python finds no module 'pkg.nothing'"),
        (("--model", "pkg.mod", *EXAMPLE), "expected package.module:factory"),
        (("--model", "torch.nn:Identity", *EXAMPLE), "unknown to the module"),
        ((*CODE, *EXAMPLE, "--task-names", "click"), "has 2 tasks"),
        ((*CODE, *EXAMPLE, "--task", "like"), "no such task"),
        ((*CODE, *EXAMPLE, "--prune-experts", "0.5"), "--prune-experts"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_does_not_fit_is_told_on_one_screen(
    arguments: tuple[str, ...], message: str, project: Project, command: Command
) -> None:
    done = command(*WEIGHTS, "-o", "refused", *arguments)

    assert done.code != 0
    assert message in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert len(done.err.splitlines()) <= SCREEN
    assert not (project.folder / "refused").exists()


class Maps(nn.Module):
    """A map of values for each row, as of depth in an image, and classes of the row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.bottom = nn.Linear(16, 1024)
        self.depth, self.kind = nn.Linear(1024, 2 * 4 * 4), nn.Linear(1024, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.bottom(x))
        return {"depth": self.depth(h).reshape(-1, 2, 4, 4), "kind": self.kind(h)}


def test_int8_of_a_map_is_judged_by_its_values(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((80, 16)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=x)
    options = ExportOptions(
        precisions=("fp32", "int8"), calibration_data=tmp_path / "rows.npz", max_accuracy_drop=5.0
    )

    result = export(Maps().eval(), tmp_path / "out", options, example_inputs=x[:4])

    assert not result.failed_variants
    fp32, int8 = result.manifest.variants
    depth, kind = int8.accuracy
    assert (depth.metric, depth.agreement) == ("relative error", None)
    assert kind.metric == "agreement"
    assert [parity.prediction.argmax_agreement is None for parity in fp32.parity] == [True, False]
    with te_runtime.load(result.bundle, precision="int8") as model:
        assert model.verify().ok
        assert model.predict(x[:3])["depth"].output.shape == (3, 2, 4, 4)


def test_labels_of_a_map_are_refused(tmp_path: Path) -> None:
    x = np.zeros((80, 16), np.float32)
    np.savez(tmp_path / "rows.npz", **{"x": x, "labels.depth": np.zeros((80, 2, 4, 4))})
    options = ExportOptions(precisions=("fp32", "int8"), calibration_data=tmp_path / "rows.npz")

    with pytest.raises(
        UsageError, match=r"'labels.depth': a row of this task's prediction has shape \(2, 4, 4\)"
    ):
        export(Maps().eval(), tmp_path / "out", options, example_inputs=x[:4])
    assert not (tmp_path / "out").exists()

"""Both wheels, built and installed the way a user would, into environments that hold nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.installs

ROOT = Path(__file__).parents[2]
BIN_FOLDER = "Scripts" if os.name == "nt" else "bin"
STEP_TIMEOUT_S = 300


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees neither the checkout nor the environment the tests run in."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / BIN_FOLDER / "python"

    def run(self, command: str, *arguments: str | Path) -> str:
        """What a command of this environment printed, run outside the checkout; a failure fails the test."""
        return run([str(self.folder / BIN_FOLDER / command), *map(str, arguments)], cwd=self.folder)

    def install(self, *what: str) -> None:
        """Installs with the pip of the tests' own environment, so that none has to be installed first."""
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(self.python)]
        run([*pip, "install", "-q", "-c", str(ROOT / "constraints.txt"), *what], cwd=self.folder)

    def see(self, site_packages: str) -> None:
        """Appends a folder of packages to the ones installed here; its .pth files are not followed."""
        own = self.run("python", "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
        (Path(own) / "more-packages.pth").write_text(f"{site_packages}\n", encoding="utf-8")


def run(command: Sequence[str], *, cwd: Path) -> str:
    """The standard output of a command; its standard error is shown where it fails."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=STEP_TIMEOUT_S
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheel(source: Path, folder: Path) -> Path:
    """Builds with the hatchling that is installed here, which needs no package index."""
    run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)],
        cwd=folder,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def new_environment(folder: Path) -> Environment:
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], cwd=folder.parent)
    return Environment(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small TaskExpert of two tasks, untrained."""
    from te_export.models.task_expert import TaskExpertConfig
    from te_export.models.task_expert_training import TaskExpertTrainer, new_model, save_checkpoint

    config = TaskExpertConfig(
        input_dim=6, backbone_dim=8, expert_dim=4, num_experts=3, num_tasks=2, task_output_dims=(3, 2)
    )
    model = new_model(config, seed=0)
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    optimizer = TaskExpertTrainer(model).optimizer
    save_checkpoint(path, model, epoch=0, optimizer=optimizer, task_names=["color", "shape"])
    return path


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the exporter of this checkout makes of the checkpoint."""
    import te_export

    return te_export.export(checkpoint, tmp_path_factory.mktemp("bundle") / "model-onnx").bundle


@pytest.fixture(scope="session")
def runtime_environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The te-runtime wheel with its [cpu] extra, and nothing else."""
    folder = tmp_path_factory.mktemp("runtime")
    wheel = build_wheel(ROOT / "runtime", folder)
    environment = new_environment(folder / "venv")
    environment.install(f"{wheel}[cpu]")
    return environment


@pytest.fixture(scope="session")
def root_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The te-export wheel."""
    return build_wheel(ROOT, tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="session")
def root_environment(root_wheel: Path) -> Environment:
    """The te-export wheel; torch and the rest are taken from the tests' own environment."""
    environment = new_environment(root_wheel.parent / "venv")
    environment.install("--no-deps", str(root_wheel))
    environment.see(sysconfig.get_paths()["purelib"])
    return environment


@pytest.mark.parametrize("package", ["torch", "onnx", "te_export"])
def test_the_runtime_installs_without(package: str, runtime_environment: Environment) -> None:
    code = f"import importlib.util; print(importlib.util.find_spec({package!r}))"

    assert runtime_environment.run("python", "-c", code).strip() == "None"


def test_the_installed_runtime_predicts(runtime_environment: Environment, bundle: Path) -> None:
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    np.save(runtime_environment.folder / "x.npy", x)
    code = """
import json, sys
import numpy as np, te_runtime
with te_runtime.load(sys.argv[1], provider="cpu") as model:
    predictions = model.predict(np.load("x.npy"))
print(json.dumps({name: [p.output.tolist(), p.routing_weights.tolist()] for name, p in predictions.items()}))
"""

    found = json.loads(runtime_environment.run("python", "-c", code, bundle))

    assert list(found) == ["color", "shape"]
    for task, classes in (("color", 3), ("shape", 2)):
        output, routing_weights = (np.array(values) for values in found[task])
        assert output.shape == (5, classes)
        assert np.isfinite(output).all()
        # Three float32 softmax outputs: their sum rounds by a few units of 2^-24.
        np.testing.assert_allclose(routing_weights.sum(axis=1), 1.0, rtol=0, atol=1e-6)


def test_the_installed_runtime_command_checks_a_bundle(
    runtime_environment: Environment, bundle: Path
) -> None:
    assert "Usage: te-runtime" in runtime_environment.run("te-runtime", "--help")
    runtime_environment.run("te-runtime", "inspect", bundle)
    runtime_environment.run("te-runtime", "verify", bundle)


def test_the_root_wheel_holds_both_packages_both_commands_and_the_license(root_wheel: Path) -> None:
    with zipfile.ZipFile(root_wheel) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (
            name.removesuffix("/METADATA") for name in names if name.endswith(".dist-info/METADATA")
        )
        commands = wheel.read(f"{metadata}/entry_points.txt").decode().split()

    assert {name.split("/")[0] for name in names} == {"te_export", "te_runtime", metadata}
    assert commands == [
        "[console_scripts]",
        "te-export",
        "=",
        "te_export.cli:main",
        "te-runtime",
        "=",
        "te_runtime.entry:main",
    ]
    for package, source in (("te_export", ROOT), ("te_runtime", ROOT / "runtime")):
        sources = (path for kind in ("*.py", "*.jinja") for path in (source / package).rglob(kind))
        assert {path.relative_to(source).as_posix() for path in sources} <= names
        assert f"{package}/py.typed" in names
    assert f"{metadata}/licenses/LICENSE" in names


def test_the_installed_commands_are_those_of_the_wheel(root_environment: Environment) -> None:
    code = "import te_export, te_runtime; print(te_export.__file__); print(te_runtime.__file__)"

    for line in root_environment.run("python", "-c", code).split():
        assert Path(line).is_relative_to(root_environment.folder)
    assert "Usage: te-export" in root_environment.run("te-export", "--help")
    assert "Usage: te-runtime" in root_environment.run("te-runtime", "--help")


def test_the_installed_commands_export_and_verify(root_environment: Environment, checkpoint: Path) -> None:
    bundle = root_environment.folder / "made-here"

    root_environment.run("te-export", checkpoint, "-o", bundle)

    assert (bundle / "manifest.json").is_file()
    root_environment.run("te-runtime", "verify", bundle)

"""Fixtures of the runtime's tests. `tiny` is the builder module; `bundle` is a fresh copy of one bundle."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/runtime/tiny_bundle.py as a module, however pytest imports tests."""
    return load_beside("tiny_bundle")


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """tests/runtime/fake_machine.py as a module."""
    return load_beside("fake_machine")


@pytest.fixture(scope="session")
def bench_fakes() -> ModuleType:
    """tests/runtime/bench_fakes.py as a module."""
    return load_beside("bench_fakes")


@pytest.fixture(scope="session")
def gpu() -> str:
    """The name of a GPU that runs graphs; skips the test where there is none."""
    from te_runtime.providers import choose_provider

    choice = choose_provider("auto")
    if choice.device is None:
        pytest.skip(f"needs a machine with an NVIDIA GPU and CUDA for onnxruntime: {choice.reason}")
    return choice.device


def load_beside(stem: str) -> ModuleType:
    """A module from this folder."""
    name = f"te_runtime_{stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{stem}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def pristine(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that no test changes."""
    root = tmp_path_factory.mktemp("pristine") / "tiny-onnx"
    tiny.write_tiny_bundle(root)
    return root


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """A bundle of the test's own."""
    root = tmp_path / "tiny-onnx"
    shutil.copytree(pristine, root)
    return root

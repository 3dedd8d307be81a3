"""`rewritten_models` is the module of builders beside this file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def rewritten_models() -> ModuleType:
    """tests/export/modules/rewritten_models.py as a module, however pytest imports tests."""
    return load_rewritten_models()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `model_name` runs for every rewritten model."""
    if "model_name" in metafunc.fixturenames:
        metafunc.parametrize("model_name", list(load_rewritten_models().REWRITTEN_MODELS))


def load_rewritten_models() -> ModuleType:
    """The one module object, made at the first call."""
    name = "rewritten_models"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("rewritten_models.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]

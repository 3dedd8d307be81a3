"""Fixtures of the scheduler's tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def fake_model() -> ModuleType:
    """tests/runtime/scheduling/fake_model.py as a module, however pytest imports tests."""
    return load_beside("fake_model")


@pytest.fixture(scope="session")
def simulation() -> ModuleType:
    """tests/runtime/scheduling/simulation.py as a module."""
    return load_beside("simulation")


def load_beside(stem: str) -> ModuleType:
    """A module from this folder."""
    name = f"te_runtime_scheduling_{stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{stem}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]

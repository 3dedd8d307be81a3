"""`nets` is the module of builders beside this file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def nets() -> ModuleType:
    """tests/export/rewrite/nets.py as a module, however pytest imports tests."""
    spec = importlib.util.spec_from_file_location("rewrite_nets", Path(__file__).parent / "nets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module

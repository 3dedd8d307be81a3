"""`rewritten_models` is the module of builders beside this file; `trace_module` traces as export does."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from te_export.modules.all_tasks import AllTasks, evaluating
from te_export.modules.example_inputs import Example, read_example_inputs
from te_export.modules.forward_form import find_forward_form
from te_export.modules.trace import Traced, trace


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


TraceModule = Callable[..., Traced]


@pytest.fixture(scope="session")
def trace_module() -> TraceModule:
    """`trace_module(module, example, task_names=None)`: the module in eval mode, traced with all its tasks, as export
    does before anything is searched or rewritten.
    """

    def traced(module: nn.Module, example: Example, task_names: tuple[str, ...] | None = None) -> Traced:
        inputs = read_example_inputs(example, module)
        with evaluating(module):
            form = find_forward_form(module, inputs, task_names)
            return trace(AllTasks(module, inputs, form), inputs.rows)

    return traced

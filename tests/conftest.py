"""What every test may rely on."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import te_runtime


@pytest.fixture(scope="session", autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """Ctrl-C is heard: a shell that starts the suite in the background makes it, and its children, deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def operators_are_read_once() -> None:
    """For each export torch.onnx reads the sources of its operators anew, a third of a second; they do not change."""
    lazy = sys.modules.get("torch.onnx._internal._lazy_import")
    apis = getattr(lazy, "onnxscript_apis", None)
    if hasattr(apis, "get_torchlib_ops") and not hasattr(apis.get_torchlib_ops, "cache_info"):
        apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)


class _OwnGraphs:
    """Every task by its own graph: mode task has it for who asks for one task and no other."""

    def __init__(self, models: Mapping[str, te_runtime.Model]) -> None:
        self._models = models
        self.inputs = next(iter(models.values())).inputs

    def predict(self, x: Any) -> dict[str, te_runtime.Prediction]:
        return {task: model.predict(x, [task])[task] for task, model in self._models.items()}


@pytest.fixture(scope="session")
def load_for_all_tasks() -> Callable[..., AbstractContextManager[Any]]:
    """As te_runtime.load, and `predict` gives all tasks; in mode task each by its own graph."""

    @contextmanager
    def load(bundle: Path, *, mode: te_runtime.Mode, **options: Any) -> Iterator[Any]:
        with ExitStack() as stack:
            model = stack.enter_context(te_runtime.load(bundle, mode=mode, **options))
            if mode != "task":
                yield model
                return
            models = {
                task: stack.enter_context(te_runtime.load(bundle, mode=mode, **options))
                for task in model.tasks
            }
            yield _OwnGraphs(models)

    return load

"""Fixtures of the scheduler's tests."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from te_runtime import Model, Scheduler
from te_runtime.scheduling.request import Request


@pytest.fixture(scope="session")
def fake_model() -> ModuleType:
    """tests/runtime/scheduling/fake_model.py as a module, however pytest imports tests."""
    return load_beside("fake_model")


@pytest.fixture(scope="session")
def simulation() -> ModuleType:
    """tests/runtime/scheduling/simulation.py as a module."""
    return load_beside("simulation")


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Request]:
    """A request with what matters to the test, and the rest plain; requests are numbered as they are made."""
    numbers = itertools.count()

    def make(
        *,
        rows: int = 1,
        tasks: tuple[str, ...] = ("a",),
        priority: float = 0.0,
        deadline_ns: int | None = None,
        submitted_ns: int = 0,
        rank_ns: int = 0,
        row_shapes: tuple[tuple[int, ...], ...] = ((4,),),
        data: tuple[bytes, ...] = (b"",),
        is_single: bool = True,
    ) -> Request:
        return Request(
            data=data,
            row_shapes=row_shapes,
            rows=rows,
            tasks=tasks,
            is_single=is_single,
            priority=priority,
            deadline_ns=deadline_ns,
            submitted_ns=submitted_ns,
            sequence=next(numbers),
            rank_ns=rank_ns,
        )

    return make


@pytest.fixture
def model(fake_model: ModuleType) -> Any:
    return fake_model.FakeModel()


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Callable[..., Scheduler]:
    """Makes schedulers that are closed after the test, whatever it did."""

    def build(model: Any, **options: Any) -> Scheduler:
        models = list(model) if isinstance(model, list) else [model]
        scheduler = Scheduler(cast(list[Model], models), **{"executors": 1, "max_delay_ms": 0, **options})
        for one in models:
            one.batches.clear()

        def end() -> None:
            for one in models:
                one.gate.set()
            scheduler.close(drain=False, timeout_s=30)

        request.addfinalizer(end)
        return scheduler

    return build


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

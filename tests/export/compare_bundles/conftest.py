"""Bundles to compare: exported ones, made once, and small ones built by hand."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import te_export
from te_export.models.task_branch import TaskBranchConfig
from te_export.models.task_branch_training import new_model
from te_export.precision import variants
from te_export.precision.latency import measure_ratios
from te_export.pruning import prune_tasks

TINY = Path(__file__).parents[2] / "runtime" / "tiny_bundle.py"
LARGE_INPUT = 160
"""With a backbone of 64 the first layer is large enough to be worth 8 bits."""


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/runtime/tiny_bundle.py as a module."""
    if "tiny_bundle" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tiny_bundle", TINY)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["tiny_bundle"] = module
        spec.loader.exec_module(module)
    return sys.modules["tiny_bundle"]


@pytest.fixture(scope="session")
def bundle_of(
    exported: te_export.ExportResult,
    make_model: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Path]]:
    """`bundle_of("one weight")`: a bundle that was exported for real, once. Not to be changed."""
    folder = tmp_path_factory.mktemp("compared")

    def export(name: str, model: torch.nn.Module, **options: Any) -> Path:
        torch.save(model.state_dict(), folder / "model.pt")  # one file name: it is part of the bytes
        asked = te_export.ExportOptions(standalone=True, **options)
        return te_export.export(folder / "model.pt", folder / name, asked).bundle

    def one_weight() -> Path:
        model = make_model()
        with torch.no_grad():
            model.experts[1].network[3].weight[2, 3] += 0.5
        return export("one-weight", model)

    def one_task_more() -> Path:
        model, wider = make_model(), make_model(task_output_dims=(4, 1, 4, 2))
        wider.load_state_dict({**wider.state_dict(), **model.state_dict()})
        return export("more", wider)

    def small_rows() -> Path:
        rows = np.random.default_rng(5).standard_normal((200, LARGE_INPUT)).astype(np.float32)
        np.savez(folder / "rows.npz", x=rows)
        return folder / "rows.npz"

    def lower() -> Path:
        asked = {"calibration_data": small_rows(), "prune_experts": 100.0, "max_accuracy_drop": 100.0}
        return export("lower", large(), precisions=("fp32", "int8"), **asked)

    def large() -> Any:
        return make_model(input_dim=LARGE_INPUT, backbone_dim=64)

    def branch() -> Path:
        sizes = {"input_dim": 20, "shared_dim": 8, "branch_dim": 8, "output_dim": 2}
        return export("branch", new_model(TaskBranchConfig(**sizes, task_names=("a", "b")), seed=1))  # type: ignore[arg-type]

    made: dict[str, Callable[[], Path]] = {
        "base": lambda: exported.bundle,
        "one weight": one_weight,
        "one task more": one_task_more,
        "two tasks turned": lambda: export("turned", make_model(), tasks=("task_2", "task_0")),
        "names": lambda: export("names", make_model(), task_names=("task_1", "task_0", "click")),
        "as captured": lambda: export("captured", make_model(), optimize="none"),
        "large": lambda: export("large", large()),
        "lower": lower,
        "branch": branch,
    }
    with pytest.MonkeyPatch.context() as patch:  # nothing here is about how fast it is
        patch.setattr(variants, "measure_ratios", functools.partial(measure_ratios, seconds=0.02))
        patch.setattr(prune_tasks, "_SECONDS", 0.02)
        yield functools.cache(lambda name: made[name]())

"""A model whose layers are large enough to convert, its graphs, and what they are judged on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from te_export.capture.opset import newest_opset
from te_export.capture.torch_capture import capture
from te_export.models.exportable import ExportableModel
from te_export.partition import GraphSet, partition
from te_export.rewrite.rewrite import rewrite, rewrite_cut
from te_export.verify.probe_rows import make_probe_rows
from te_export.verify.references import References, evaluate_references
from te_runtime.manifest import OptimizeLevel, TargetProvider

WIDE: dict[str, object] = {
    "input_dim": 96,
    "backbone_dim": 128,
    "expert_dim": 128,
    "num_experts": 3,
    "task_output_dims": (4, 1, 3),
}

MakeGraphs = Callable[..., GraphSet]


@pytest.fixture(scope="session")
def wide(make_model: Callable[..., Any], load: Callable[..., ExportableModel]) -> ExportableModel:
    """Three tasks, one of them of one output, over layers of up to 32,768 weights. Not to be changed."""
    return load(make_model(seed=5, **WIDE).state_dict())


@pytest.fixture(scope="session")
def wide_graphs(wide: ExportableModel) -> MakeGraphs:
    """`wide_graphs(level, provider, opset)`: its graphs, made once for each choice. Not to be changed."""
    made: dict[tuple[object, ...], GraphSet] = {}

    def graphs(
        level: OptimizeLevel = "exact", provider: TargetProvider = "cpu", opset: int | None = None
    ) -> GraphSet:
        key = (level, provider, opset)
        if key not in made:
            captured = capture(wide, opset or newest_opset())
            rewritten = rewrite(captured, provider=provider, level=level)
            made[key], _ = rewrite_cut(
                partition(rewritten.graph), captured, rewritten.log, provider=provider, level=level
            )
        return made[key]

    return graphs


@pytest.fixture(scope="session")
def wide_references(wide: ExportableModel) -> References:
    """Oracle and torch float32 over its probe rows. Not to be changed."""
    return evaluate_references(wide, make_probe_rows(wide))

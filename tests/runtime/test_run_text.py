from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from te_runtime.plan import Plan
from te_runtime.prediction import Prediction
from te_runtime.providers import ProviderChoice
from te_runtime.run_text import RunReport, run_json, run_text
from te_runtime.utilization import Utilization

REPORT = RunReport(
    predictions={"a": Prediction(np.ones((100, 20)), None, "cpu")},
    output=Path("o.npz"),
    precision="fp32",
    choice=ProviderChoice("auto", "cpu", "no CUDA here: no driver", None),
    plan=Plan("joint", ("fp32/joint.onnx",), "asked for"),
    utilization={},
)


def test_long_rows_and_many_rows_are_cut() -> None:
    lines = list(run_text(REPORT))
    assert lines[0] == "a: prediction (100, 20)"
    assert lines[1].endswith("… 12 more")
    assert lines[4] == "  … 97 more rows"
    assert lines[5] == "Ran fp32 on cpu, mode joint"
    assert lines[6] == "provider auto took cpu: no CUDA here: no driver"
    assert len(lines) == 9


@pytest.mark.parametrize(
    ("used", "line"),
    [
        (
            Utilization(5, 0, (0.75, 0.25), (0.5, 0.5), 0.25),
            "  mean routing weights 0.75 0.25; 0.25 from the baseline (0 same, 1 unlike)",
        ),
        (
            Utilization(5, 0, (1.0, 0.0), None, None),
            "  mean routing weights 1.00 0.00; this bundle has no baseline",
        ),
        (
            Utilization(3, 2, (1.0, 0.0), None, None),
            "  mean routing weights 1.00 0.00; this bundle has no baseline; 2 of 5 rows left out: not finite",
        ),
        (Utilization(0, 0, None, (0.5, 0.5), None), "  mean routing weights: no rows"),
        (
            Utilization(0, 2, None, (0.5, 0.5), None),
            "  mean routing weights: no rows; 2 of 2 rows left out: not finite",
        ),
        (
            Utilization(1, 0, (0.1,) * 10, (0.1,) * 10, 0.0),
            "  mean routing weights 0.10 0.10 0.10 0.10 0.10 0.10 0.10 0.10 … 2 more; "
            "0 from the baseline (0 same, 1 unlike)",
        ),
    ],
)
def test_one_line_tells_how_the_experts_were_used(used: Utilization, line: str) -> None:
    report = replace(REPORT, utilization={"a": used, "not asked for": used})
    assert [found for found in run_text(report) if "routing" in found] == [line]
    found = json.loads(json.dumps(run_json(report), allow_nan=False))
    assert found["tasks"]["a"]["utilization"]["rows_not_finite"] == used.rows_not_finite
    assert list(found["tasks"]) == ["a"]

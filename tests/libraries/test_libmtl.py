"""Models of LibMTL: an image batch in, a dict with a tensor per task out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.libraries

FLOAT32_ROUNDING = 1e-5
"""Of two float32 evaluations of a few small layers; other weights differ by thousands of times as much."""
TASKS = ["segment", "depth", "normal"]


@pytest.mark.parametrize(
    ("name", "experts"),
    [("libmtl-mmoe", [3, 3, 3]), ("libmtl-cgc", [3, 4, 3]), ("libmtl-ple", [3, 3, 3])],
)
def test_a_model_with_gates(
    name: str, experts: list[int], export_soundly: Callable[[str], dict[str, Any]]
) -> None:
    found = export_soundly(name)

    assert found["tasks"] == found["found_gates"] == TASKS
    assert [weights["experts"] for weights in found["weights"]] == experts


@pytest.mark.parametrize("name", ["libmtl-hps", "libmtl-mtan", "libmtl-cross-stitch"])
def test_a_model_without_gates(name: str, export_soundly: Callable[[str], dict[str, Any]]) -> None:
    found = export_soundly(name)

    assert found["tasks"] == TASKS
    assert found["found_gates"] == []


def test_gates_that_are_no_softmax_are_right_or_not_found(
    export_soundly: Callable[[str], dict[str, Any]],
) -> None:
    assert export_soundly("libmtl-dselect-k")["tasks"] == TASKS


def test_the_command_exports_from_weights_and_a_factory(
    export_by_command: Callable[[str, str], dict[str, Any]],
) -> None:
    found = export_by_command("libmtl-cgc", "libmtl_models:build_cgc")

    assert found["tasks"] == TASKS
    assert max(found["relative_errors"].values()) <= FLOAT32_ROUNDING

"""Models of torch-rechub: dicts of named features in, one tensor with a column per task out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.libraries

FLOAT32_ROUNDING = 1e-5
"""Of two float32 evaluations of a few small layers; other weights differ by thousands of times as much."""
TASKS = ["click", "buy", "seconds"]


@pytest.mark.parametrize(("name", "experts"), [("rechub-mmoe", 4), ("rechub-ple", 5)])
def test_a_model_with_gates(name: str, experts: int, export_soundly: Callable[[str], dict[str, Any]]) -> None:
    found = export_soundly(name)

    assert found["tasks"] == found["found_gates"] == TASKS
    assert [weights["experts"] for weights in found["weights"]] == [experts] * 3


def test_a_shared_bottom_has_no_gates(export_soundly: Callable[[str], dict[str, Any]]) -> None:
    found = export_soundly("rechub-shared-bottom")

    assert found["tasks"] == TASKS
    assert found["found_gates"] == []


def test_a_task_that_is_the_product_of_two_others(export_soundly: Callable[[str], dict[str, Any]]) -> None:
    found = export_soundly("rechub-esmm")

    assert found["tasks"] == ["cvr", "ctr", "ctcvr"]
    assert found["found_gates"] == []
    cvr, ctr, both = (size["graph"]["parameters"] for size in found["sizes"])
    assert max(cvr, ctr) < both


def test_tasks_that_hand_on_what_they_found(export_soundly: Callable[[str], dict[str, Any]]) -> None:
    found = export_soundly("rechub-aitm")

    assert found["tasks"] == ["impression", "click", "buy"]
    sizes = [size["graph"]["parameters"] for size in found["sizes"]]
    assert sizes == sorted(sizes)


def test_the_command_exports_from_weights_and_a_factory(
    export_by_command: Callable[[str, str], dict[str, Any]],
) -> None:
    found = export_by_command("rechub-mmoe", "rechub_models:build_mmoe")

    assert found["tasks"] == TASKS
    assert max(found["relative_errors"].values()) <= FLOAT32_ROUNDING

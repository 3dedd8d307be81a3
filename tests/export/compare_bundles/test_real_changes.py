"""Each kind of change, made by exporting again: what the comparison finds, and that it finds nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from te_export.compare_bundles import BundleDiff, diff
from te_export.compare_bundles.result import TaskPair, VariantChange, WeightChange

BundleOf = Callable[[str], Path]


def weights(found: BundleDiff, status: str) -> list[WeightChange]:
    return [weight for weight in found.weights.weights if weight.status == status]


def parts(changes: Iterable[WeightChange]) -> set[str]:
    return {change.part for change in changes}


def variant(found: BundleDiff, precision: str) -> VariantChange:
    (change,) = (change for change in found.variants if change.precision == precision)
    return change


def test_a_bundle_and_its_copy_are_equal(bundle_of: BundleOf, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle_of("base"), tmp_path / "copy")

    for other in (bundle_of("base"), copy):
        found = diff(bundle_of("base"), other)
        assert not found.is_different
        assert (found.model, found.inputs, found.routing) == ((), (), ())
        assert {weight.status for weight in found.weights.weights} == {"same"}
        assert all(file.is_same for file in found.files)
        assert found.golden_is_same


def test_a_bundle_inside_another_is_compared_as_any(bundle_of: BundleOf, tmp_path: Path) -> None:
    outer = shutil.copytree(bundle_of("base"), tmp_path / "outer")
    inner = shutil.copytree(bundle_of("base"), outer / "inner")

    assert not diff(outer, inner).is_different
    assert not diff(inner, outer).is_different


def test_every_weight_of_the_checkpoint_has_its_part(bundle_of: BundleOf) -> None:
    found = diff(bundle_of("base"), bundle_of("base"))

    of_part: dict[str, int] = {}
    for weight in found.weights.weights:
        of_part[weight.part] = of_part.get(weight.part, 0) + 1
    tails = {f"{place} of task_{task}": 4 for task in range(3) for place in ("gate", "head")}
    assert of_part == {"backbone": 4, "expert 0": 6, "expert 1": 6, "expert 2": 6, **tails}
    shapes = {weight.name: weight.shape_before for weight in found.weights.weights}
    assert shapes["experts.2.network.3.weight"] == (8, 16)  # stored as the last third of a stack, turned
    assert shapes["gating_networks.1.gate.0.weight"] == (8, 24)


def test_one_weight(bundle_of: BundleOf) -> None:
    found = diff(bundle_of("base"), bundle_of("one weight"))

    (weight,) = weights(found, "changed")
    assert (weight.part, weight.name) == ("expert 1", "experts.1.network.3.weight")
    assert weight.values is not None
    assert (weight.values.elements, weight.values.changed) == (128, 1)
    # one float32 addition: 0.5 to half an ulp of a number below 2
    assert weight.values.max_abs_difference == pytest.approx(0.5, abs=1.2e-7)
    assert weight.values.rms_difference == pytest.approx(0.5 / 128**0.5, rel=1e-6)
    assert {other.status for other in found.weights.weights} == {"same", "changed"}
    assert [fact.name for fact in found.model] == ["checkpoint sha256"]
    assert not found.tasks.is_different
    assert found.variants[0].graphs == ()
    assert found.is_different
    assert [change.task.before for change in found.routing] == ["task_0", "task_1", "task_2"]
    assert all(change.distance is not None and 0 < change.distance < 0.2 for change in found.routing)


def test_one_task_more(bundle_of: BundleOf) -> None:
    found = diff(bundle_of("base"), bundle_of("one task more"))

    assert (found.tasks.added, found.tasks.removed, found.tasks.renamed) == (("task_3",), (), ())
    assert not found.tasks.is_reordered
    assert parts(weights(found, "added")) == {"gate of task_3", "head of task_3"}
    assert weights(found, "changed") + weights(found, "removed") + weights(found, "reshaped") == []
    assert {"config.num_tasks", "config.task_output_dims"} <= {fact.name for fact in found.model}
    assert {change.before for change in variant(found, "fp32").parity} - {None}


def test_fewer_tasks_in_another_order(bundle_of: BundleOf) -> None:
    found = diff(bundle_of("base"), bundle_of("two tasks turned"))

    assert (found.tasks.added, found.tasks.removed) == ((), ("task_1",))
    assert found.tasks.is_reordered
    assert found.tasks.renamed == ()
    assert parts(weights(found, "removed")) == {"gate of task_1", "head of task_1"}
    assert not diff(bundle_of("one task more"), bundle_of("base")).tasks.is_reordered


def test_tasks_are_told_by_their_weights_where_names_moved(bundle_of: BundleOf) -> None:
    found = diff(bundle_of("base"), bundle_of("names"))

    pairs = {(pair.before, pair.after) for pair in found.tasks.renamed}
    assert pairs == {("task_0", "task_1"), ("task_1", "task_0"), ("task_2", "click")}
    assert (found.tasks.added, found.tasks.removed, found.tasks.changes) == ((), (), ())
    assert not found.weights.is_different
    assert {weight.part for weight in found.weights.weights} >= {"gate of task_0 → gate of task_1"}
    assert found.routing == ()
    assert variant(found, "fp32").parity == ()


def test_the_same_weights_as_captured(bundle_of: BundleOf) -> None:
    found = diff(bundle_of("as captured"), bundle_of("base"))

    changed = variant(found, "fp32")
    assert [(fact.name, fact.before, fact.after) for fact in changed.facts] == [
        ("optimized", "none", "exact")
    ]
    joint = next(graph for graph in changed.graphs if graph.kind == "joint")
    assert sum(joint.operators_before.values()) > sum(joint.operators_after.values())
    # Turned and stacked weights are found again under their names; only what was folded is another tensor.
    assert weights(found, "changed") + weights(found, "reshaped") == []
    assert {weight.name.split(".network.")[1] for weight in weights(found, "removed")} == {
        "0.weight", "0.bias", "6.weight", "6.bias"
    }  # fmt: skip
    assert all(weight.name.endswith(".folded") for weight in weights(found, "added"))
    assert parts(weights(found, "added")) == {"expert 0", "expert 1", "expert 2"}
    assert not found.tasks.is_different
    assert [fact.name for fact in found.model] == []


def test_int8_and_pruned_graphs_added(bundle_of: BundleOf) -> None:
    found = diff(bundle_of("large"), bundle_of("lower"))

    int8 = variant(found, "int8")
    assert int8.before is None
    assert int8.after is not None
    assert int8.after.size_bytes > 0
    assert not found.weights.is_different
    pruned = variant(found, "fp32").pruned
    assert pruned
    for change in pruned:
        assert change.experts_before is None
        assert change.experts_after
        assert change.loss.before is None
        assert change.loss.after is not None
    added = {file.path for file in found.files if file.before_bytes is None}
    assert {"int8/weights.bin", f"fp32/pruned-{pruned[0].task.after}.onnx"} <= added


def test_another_family(bundle_of: BundleOf) -> None:
    found = diff(bundle_of("base"), bundle_of("branch"))

    families = [(fact.before, fact.after) for fact in found.model if fact.name == "family"]
    assert families == [("TaskExpert", "TaskBranch")]
    assert "aggregate" in found.tasks.added
    assert {weight.status for weight in found.weights.weights} == {"removed", "added"}
    assert "head of task_0 and aggregate" in parts(weights(found, "added"))
    shared = TaskPair("task_0", "task_0")
    (change,) = (change for change in found.tasks.changes if change.task == shared)
    assert ("prediction shape", ("batch", 4), ("batch", 2)) in [
        (fact.name, fact.before, fact.after) for fact in change.facts
    ]
    assert [routing.distance for routing in found.routing] == [None] * len(found.routing)

"""Figures of two manifests side by side: parity, accuracy, pruning, routing, latency, inputs, versions, files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from te_export.compare_bundles import BundleDiff, diff
from te_export.compare_bundles.result import Fact, TaskPair
from te_export.compare_bundles.result_json import diff_object
from te_export.compare_bundles.text import diff_lines

Edit = Callable[[dict[str, Any]], object]
Compare = Callable[..., BundleDiff]
MEASURED: dict[str, Any] = {
    "machine": "Some CPU @ 3 GHz",
    "onnxruntime": "1.31.1",
    "provider": "cpu",
    "threads": 1,
    "graphs": [],
}


def timed(p50_us: float, *, batch: int = 1, path: str = "fp32/joint.onnx") -> dict[str, Any]:
    """Spread 10% either way."""
    times = {"p50_us": p50_us, "p10_us": p50_us * 0.9, "p90_us": p50_us * 1.1}
    return {"path": path, "batch": batch, **times, "rounds": 50, "ratio": 1.0}


@pytest.fixture
def compare(tiny: ModuleType, tmp_path: Path) -> Compare:
    """`compare(edit, edit_a)`: a tiny bundle and its copy with an edited manifest; `edit_a` edits the first."""

    def run(edit: Edit, edit_a: Edit | None = None, **options: Any) -> BundleDiff:
        tiny.write_tiny_bundle(tmp_path / "a", **options)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        tiny.edit_manifest(tmp_path / "b", edit)
        if edit_a is not None:
            tiny.edit_manifest(tmp_path / "a", edit_a)
        return diff(tmp_path / "a", tmp_path / "b")

    return run


def text(found: BundleDiff) -> str:
    return "\n".join(diff_lines(found, verbose=False))


def test_parity_is_the_largest_error_over_its_bound(compare: Compare) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        group = manifest["variants"][0]["parity"][1]["prediction"]["groups"][0]
        group["max_abs_error"] = group["bound"] * 0.75

    found = compare(edit)

    (change,) = found.variants[0].parity
    assert change.task == TaskPair("task_1", "task_1")
    assert change.before == pytest.approx(0.01)  # tiny bundles are made with bounds of 100 errors
    assert change.after == pytest.approx(0.75)
    assert found.is_different
    assert "fp32     task_1  0.01  0.75" in text(found)


def test_versions_config_and_inputs(compare: Compare) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["producer"]["torch"] = "2.14.0"
        manifest["producer"]["opset"] = 20
        manifest["model"]["config"] = {"experts": 3, "dropout": 0.5}
        manifest["model"]["checkpoint_sha256"] = "f" * 64

    found = compare(edit)

    assert {(fact.name, fact.before, fact.after) for fact in found.model} == {
        ("torch version", "2.13.0", "2.14.0"),
        ("opset", 17, 20),
        ("config.gated", True, None),
        ("config.dropout", None, 0.5),
        ("checkpoint sha256", "0" * 64, "f" * 64),
    }
    assert "unchanged   family, inputs" in text(found)


def test_one_and_true_are_different_values(compare: Compare) -> None:
    found = compare(lambda manifest: manifest["model"]["config"].update(gated=1))

    assert found.model == (Fact("config.gated", True, 1),)


def test_routing_moved(compare: Compare) -> None:
    def means(*values: float) -> Edit:
        return lambda manifest: manifest["utilization"][0].update(mean=list(values))

    found = compare(means(0.2, 0.3, 0.5), means(0.5, 0.3, 0.2))

    (change,) = found.routing
    assert change.task == TaskPair("task_0", "task_0")
    assert change.distance == pytest.approx(0.3)
    assert "task_0  0.300" in text(found)


def accuracy(task: str, loss: float, **values: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "task": task,
        "source": "calibration data",
        "rows": 100,
        "metric": "agreement",
        "loss_points": loss,
        "budget_points": 0.5,
        "oracle_percent": None,
        "variant_percent": None,
        "agreement": 1.0,
        "relative_error": 0.0,
        "routing_kl": None,
        "top_expert_agreement": None,
    }
    return {**found, **values}


def with_accuracy(loss: float, **values: Any) -> Edit:
    def edit(manifest: dict[str, Any]) -> None:
        losses = [accuracy("task_0", loss, **values), accuracy("task_1", 0.1)]
        manifest["variants"][0]["accuracy"] = losses

    return edit


def test_accuracy_lost(compare: Compare) -> None:
    found = compare(with_accuracy(0.4), with_accuracy(0.25))

    (change,) = found.variants[0].accuracy
    assert (change.task, change.before, change.after, change.facts) == (
        TaskPair("task_0", "task_0"),
        0.25,
        0.4,
        (),
    )
    assert "accuracy lost, in percentage points" in text(found)
    assert "judged otherwise" not in text(found)


def test_accuracy_judged_on_other_rows_is_said(compare: Compare) -> None:
    found = compare(with_accuracy(0.4, rows=50, metric="R2"), with_accuracy(0.4))

    (change,) = found.variants[0].accuracy
    assert change.facts == (Fact("metric", "agreement", "R2"), Fact("rows", 100, 50))
    assert "judged otherwise" in text(found)


def test_kept_weights(compare: Compare) -> None:
    def kept(*names: str) -> Edit:
        return lambda manifest: manifest["variants"][0].update(kept_weights=list(names))

    found = compare(kept("a", "c"), kept("a", "b"))

    assert (found.variants[0].kept_added, found.variants[0].kept_removed) == (("c",), ("b",))
    assert "now kept in higher precision: c" in " ".join(text(found).split())


def latency(*graphs: dict[str, Any], **values: Any) -> Edit:
    return lambda manifest: manifest.update(latency={**MEASURED, "graphs": list(graphs), **values})


def test_latency_alone_is_no_difference_and_shown(compare: Compare) -> None:
    found = compare(
        latency(timed(120.0), timed(300.0, batch=8)), latency(timed(100.0), timed(150.0, batch=8))
    )

    assert not found.is_different
    graphs = found.latency.graphs
    assert [(graph.batch, found.latency.ratio(graph), graph.spreads_overlap) for graph in graphs] == [
        (1, pytest.approx(1.2), True),
        (8, pytest.approx(2.0), False),
    ]
    shown = text(found)
    assert shown.startswith("no differences in what the bundles compute")
    assert "~1.20x" in shown
    assert "  2.00x" in shown
    assert "te-runtime bench" in shown
    assert "separate runs" in shown


@pytest.mark.parametrize(
    "values", [{"machine": "Other CPU"}, {"threads": 2}, {"onnxruntime": "1.30.0"}, {"provider": "cuda"}]
)
def test_latency_of_different_machines_has_no_ratio(values: dict[str, Any], compare: Compare) -> None:
    found = compare(latency(timed(120.0), **values), latency(timed(100.0)))

    assert not found.latency.is_comparable
    (graph,) = found.latency.graphs
    assert found.latency.ratio(graph) is None
    shown = " ".join(text(found).split())
    assert "different machines or in different ways, so there is no ratio" in shown
    assert "B/A" not in shown.split("latency")[1]
    told = diff_object(found, exit_code=0)["latency"]
    assert isinstance(told, dict)
    assert (told["comparable"], told["graphs"][0]["ratio"]) == (False, None)


def test_latency_without_a_common_graph(compare: Compare) -> None:
    found = compare(latency(timed(120.0, batch=2)), latency(timed(100.0)))

    assert found.latency.graphs == ()
    assert "no graph was measured at the same batch size in both" in text(found)


@pytest.mark.parametrize(("which", "said"), [("a", "B"), ("b", "A"), ("none", "A or B")])
def test_latency_that_was_not_measured_is_one_line(which: str, said: str, compare: Compare) -> None:
    def changed(manifest: dict[str, Any]) -> None:
        manifest["producer"]["opset"] = 20
        if which == "b":
            latency(timed(120.0))(manifest)

    found = compare(changed, latency(timed(100.0)) if which == "a" else None)

    lines = [line for line in text(found).splitlines() if line.startswith("latency")]
    assert lines == [f"latency: not measured by the export of {said}; --measure-latency does"]


def test_reports_alone_are_no_difference(tiny: ModuleType, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny.write_tiny_bundle(tmp_path / name)
        (tmp_path / name / "report.md").write_text(f"told by {name}")
        tiny.rehash(tmp_path / name)

    found = diff(tmp_path / "a", tmp_path / "b")

    assert not found.is_different
    assert text(found) == "no differences in what the bundles compute; other: report.md"
    assert [file.path for file in found.files if not file.is_same] == ["report.md"]


def test_a_node_with_another_attribute(tiny: ModuleType, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny.write_tiny_bundle(tmp_path / name)

    def edit(model: Any) -> None:
        (softmax,) = (node for node in model.graph.node if node.op_type == "Softmax")
        softmax.attribute[0].i = 1

    tiny.edit_graph(tmp_path / "b", "tail-task_1", edit)

    found = diff(tmp_path / "a", tmp_path / "b")

    (change,) = found.variants[0].graphs
    assert (change.kind, change.task) == ("tail", TaskPair("task_1", "task_1"))
    assert change.operators_before == change.operators_after
    assert found.variants[0].compared_graphs == 7
    assert not found.weights.is_different
    assert "1 of 7 graphs: the same operators" in " ".join(text(found).split())


def as_fp16(manifest: dict[str, Any]) -> None:
    """Call the one variant fp16."""
    variant = manifest["variants"][0]
    graphs = [variant["joint"], variant["trunk"], variant["joint_tails"]]
    for task in variant["tasks"]:
        graphs += [task["graph"], task["tail"], task["standalone"]]
    for named in (*graphs, *manifest["files"]):
        named["path"] = named["path"].replace("fp32/", "fp16/")
    variant.update(precision="fp16", weights="fp16/weights.bin")


def test_bundles_without_fp32_are_compared_without_weights(tiny: ModuleType, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny.write_tiny_bundle(tmp_path / name)
    (tmp_path / "b" / "fp32").rename(tmp_path / "b" / "fp16")
    tiny.edit_manifest(tmp_path / "b", as_fp16)

    found = diff(tmp_path / "a", tmp_path / "b")

    assert not found.weights.is_compared
    assert [(change.precision, change.before is None, change.after is None) for change in found.variants] == [
        ("fp32", False, True),
        ("fp16", True, False),
    ]
    assert [pair.before for pair in found.tasks.in_both] == ["task_0", "task_1"]
    assert "weights: not compared" in text(found)
    assert diff_object(found, exit_code=0)["weights"] is None


def test_many_tasks(tiny: ModuleType, tmp_path: Path) -> None:
    outputs = {f"task_{index}": 2 for index in range(200)}
    tiny.write_tiny_bundle(tmp_path / "a", outputs=outputs, standalone=False)
    fewer = dict(list(outputs.items())[:-1])
    tiny.write_tiny_bundle(tmp_path / "b", outputs={**fewer, "last": 2}, standalone=False)

    found = diff(tmp_path / "a", tmp_path / "b")

    assert len(found.tasks.in_both) == 200
    assert [(pair.before, pair.after) for pair in found.tasks.renamed] == [("task_199", "last")]
    assert not found.weights.is_different
    lines = text(found).splitlines()
    assert len(lines) < 60
    assert "renamed     task_199 → last" in text(found)


def test_other_weights_of_many_tasks_fit_a_screen_or_two(tiny: ModuleType, tmp_path: Path) -> None:
    outputs = {f"task_{index}": 2 for index in range(60)}
    for seed, name in enumerate("ab"):
        tiny.write_tiny_bundle(tmp_path / name, outputs=outputs, seed=seed, standalone=False)

    found = diff(tmp_path / "a", tmp_path / "b")

    assert all(weight.status == "changed" for weight in found.weights.weights)
    assert len(text(found).splitlines()) < 75
    assert "backbone" in text(found)
    assert len(list(diff_lines(found, verbose=True))) > 4 * 60

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

import te_runtime
from te_runtime.golden import VerifyReport
from te_runtime.golden_rows import MAX_GOLDEN_BYTES
from te_runtime.interfaces import variant_graphs
from te_runtime.providers import ProviderChoice
from te_runtime.verify_text import verify_json, verify_text

CPU = ProviderChoice("cpu", "cpu", "asked for", None)


def verified(root: Path) -> VerifyReport:
    with te_runtime.load(root, threads=1) as model:
        return model.verify()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gated": False},
        {"two_inputs": True},
        {"gates_read_inputs": True},
        {"standalone": False},
        {"joint_tails": False},
    ],
)
def test_a_good_bundle_is_verified_through_every_graph(
    tiny: ModuleType, tmp_path: Path, options: dict[str, object]
) -> None:
    manifest = tiny.write_tiny_bundle(tmp_path / "b", **options)
    report = verified(tmp_path / "b")
    assert report.ok
    assert report.rows == 8
    assert [check.task for check in report.tasks] == ["task_0", "task_1"]
    assert all(check.worst.ratio <= 1 for check in report.tasks)
    whole = {"fp32/joint.onnx"} | {task.graph.path for task in manifest.variants[0].tasks}
    whole |= {task.standalone.path for task in manifest.variants[0].tasks if task.standalone}
    whole |= {f"fp32/trunk.onnx + {task.tail.path}" for task in manifest.variants[0].tasks}
    if options.get("joint_tails", True):
        whole.add("fp32/trunk.onnx + fp32/joint-tails.onnx")
    assert set(report.graphs) == whole
    files = [graph.path for graph in variant_graphs(manifest.variants[0])]
    assert sorted(report.graph_files) == sorted(files)
    assert f"8 golden rows through {len(files)} graphs" in next(iter(verify_text("b", report, CPU)))
    assert verify_json(report, CPU)["graphs"] == list(report.graph_files)


@pytest.mark.parametrize(
    ("graph", "named"),
    [
        ("joint", "fp32/joint.onnx"),
        ("task-task_1", "fp32/task-task_1.onnx"),
        ("standalone-task_1", "fp32/standalone-task_1.onnx"),
        ("tail-task_1", "fp32/trunk.onnx + fp32/tail-task_1.onnx"),
        ("joint-tails", "fp32/trunk.onnx + fp32/joint-tails.onnx"),
    ],
)
def test_a_graph_that_gives_other_numbers_is_named(
    bundle: Path, tiny: ModuleType, graph: str, named: str
) -> None:
    def shift_bias(model: Any) -> None:
        tensor = next(entry for entry in model.graph.initializer if entry.name == "task_1.head.b")
        tensor.CopyFrom(numpy_helper.from_array(np.array([0.5, np.nan], dtype=np.float32), tensor.name))

    tiny.edit_graph(bundle, graph, shift_bias)
    report = verified(bundle)
    assert not report.ok
    assert {mismatch.graph for mismatch in report.mismatches} == {named}
    assert {mismatch.task for mismatch in report.mismatches} == {"task_1"}
    worst = report.mismatches[0]
    assert (worst.output, worst.batch, worst.column) == ("prediction", 8, 1)
    assert worst.values_out_of_bound == 16
    assert math.isnan(worst.found)
    assert worst.ratio == math.inf
    assert [check.values_out_of_bound > 0 for check in report.tasks] == [False, True]
    text = "\n".join(verify_text("b", report, CPU))
    assert f"mismatch: graph {named}, task task_1, prediction, row 0, column 1" in text
    assert "FAILED task_1" in text
    json.dumps(verify_json(report, CPU), allow_nan=False)


def test_a_value_at_its_bound_is_within_and_one_beyond_is_not(bundle: Path, tiny: ModuleType) -> None:
    """The oracle is moved by the bound of its group: within; by two bounds: out."""
    bound = json.loads((bundle / "manifest.json").read_text())["variants"][0]["parity"][0]["prediction"][
        "groups"
    ][1]
    for factor, expected in ((0.9, True), (2.0, False)):
        moved = factor * bound["bound"]

        def move(arrays: dict[str, np.ndarray], moved: float = moved) -> None:
            arrays["task_0.prediction"][6, 1] += moved

        tiny.edit_golden(bundle, move)
        report = verified(bundle)
        assert report.ok is expected
    assert {(m.row, m.column, m.output) for m in report.mismatches} == {(6, 1, "prediction")}
    assert report.mismatches[0].allowed == bound["bound"]


def test_a_single_row_is_run_for_each_group(bundle: Path, tiny: ModuleType) -> None:
    tiny.edit_golden(bundle, lambda arrays: arrays["task_0.routing_weights"].__setitem__((5, 0), 9.0))
    report = verified(bundle)
    assert {(m.batch, m.row) for m in report.mismatches} == {(8, 5), (1, 5)}


def test_a_bound_of_zero_allows_only_the_same_number(bundle: Path, tiny: ModuleType) -> None:
    def no_error(data: dict[str, Any]) -> None:
        for group in data["variants"][0]["parity"][0]["prediction"]["groups"]:
            group["bound"] = 0.0

    tiny.edit_manifest(bundle, no_error)
    report = verified(bundle)
    assert not report.ok
    assert report.tasks[0].worst.ratio == math.inf
    assert report.tasks[1].worst.ratio <= 1


def remove(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda arrays: arrays.pop(name)


def replace(
    name: str, change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda arrays: arrays.update({name: change(arrays[name])})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("input.x"), "array 'input.x' is missing"),
        (remove("task_1.prediction"), "array 'task_1.prediction' is missing"),
        (remove("task_0.routing_weights"), "array 'task_0.routing_weights' is missing"),
        (replace("input.x", lambda a: a[:-1]), r"float32 \(7, 6\), expected float32 \(8, 6\)"),
        (replace("input.x", lambda a: a.astype(float)), r"float64 \(8, 6\), expected float32"),
        (replace("task_0.prediction", lambda a: a[:, :1]), r"float64 \(8, 1\), expected float64 \(8, 2\)"),
        (replace("task_0.prediction", lambda a: a.astype("f4")), "float32"),
        (replace("task_0.prediction", lambda a: a.ravel()), r"float64 \(16,\)"),
        (replace("task_0.prediction", lambda a: a * np.nan), "not finite"),
        (replace("task_0.prediction", lambda a: a + np.inf), "not finite"),
        (replace("task_0.prediction", lambda a: np.array([object()])), "pickled"),
    ],
)
def test_golden_rows_that_do_not_fit_are_refused(
    bundle: Path, tiny: ModuleType, edit: Callable[[dict[str, np.ndarray]], object], message: str
) -> None:
    tiny.edit_golden(bundle, edit, pickled=True) if message == "pickled" else tiny.edit_golden(bundle, edit)
    with pytest.raises(te_runtime.BundleError, match=message) as caught:
        verified(bundle)
    assert "golden.npz" in str(caught.value)


def test_more_arrays_than_needed_are_ignored(bundle: Path, tiny: ModuleType) -> None:
    tiny.edit_golden(bundle, lambda arrays: arrays.update(more=np.zeros(3)))
    assert verified(bundle).ok


def test_a_group_of_rows_without_a_bound_is_refused(bundle: Path, tiny: ModuleType) -> None:
    tiny.edit_manifest(bundle, lambda m: m["variants"][0]["parity"][0]["prediction"]["groups"].pop())
    with pytest.raises(te_runtime.BundleError, match=r"fp32 task_0\.prediction has no bound for .* 'large'"):
        verified(bundle)


def test_routing_weights_without_parity_are_refused(bundle: Path, tiny: ModuleType) -> None:
    tiny.edit_manifest(bundle, lambda m: m["variants"][0]["parity"][1].update(routing_weights=None))
    with pytest.raises(
        te_runtime.BundleError, match="task 'task_1' has routing weights but no parity figures"
    ):
        verified(bundle)


def test_no_golden_rows_verify_nothing(bundle: Path, tiny: ModuleType) -> None:
    tiny.edit_manifest(bundle, lambda m: m["golden"].update(groups=[]))
    with pytest.raises(te_runtime.BundleError, match="nothing can be verified"):
        verified(bundle)


def test_golden_rows_that_would_fill_the_memory_are_refused_unread(bundle: Path, tiny: ModuleType) -> None:
    """The manifest and the archive's header agree on a gigabyte; the archive itself is small."""
    rows = 50_000_000 // 8 * 8
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (rows, 6)})
    with zipfile.ZipFile(bundle / "golden.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("input.x", "task_0.prediction", "task_0.routing_weights"):
            archive.writestr(f"{name}.npy", header.getvalue())
        for name in ("task_1.prediction", "task_1.routing_weights"):
            archive.writestr(f"{name}.npy", header.getvalue())
    data = bytearray((bundle / "golden.npz").read_bytes())
    start = data.rindex(b"PK\x01\x02")  # the last entry of the directory: claim a huge size
    data[start + 24 : start + 28] = (MAX_GOLDEN_BYTES + 1).to_bytes(4, "little")
    (bundle / "golden.npz").write_bytes(data)
    tiny.rehash(bundle)
    with pytest.raises(te_runtime.BundleError, match=f"expected at most {MAX_GOLDEN_BYTES}"):
        verified(bundle)

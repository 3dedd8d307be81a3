"""Tasks that share nothing have no trunk: `trunk` is null, and each task's tail is its task graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import te_runtime
from te_runtime.bundle import open_bundle
from te_runtime.errors import BundleError, InputError
from te_runtime.interfaces import variant_graphs
from te_runtime.providers import ProviderChoice
from te_runtime.verify_text import verify_text

CPU = ProviderChoice("cpu", "cpu", "asked for", None)
MODES = ("joint", "split", "task")
FILES = ("fp32/joint.onnx", "fp32/task-a.onnx", "fp32/task-b.onnx")


@pytest.fixture(scope="module")
def builder(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The builder, with `root`: a bundle without a trunk. Not to be changed."""
    made = tiny.TinyBundle(tiny.TinyOptions(outputs={"a": 2, "b": 1}, trunk=False, standalone=False))
    made.root = tmp_path_factory.mktemp("no-trunk") / "tiny-onnx"
    made.write(made.root)
    return made


def own_copy(tiny: ModuleType, tmp_path: Path) -> Path:
    tiny.write_tiny_bundle(tmp_path / "b", outputs={"a": 2, "b": 1}, trunk=False, standalone=False)
    return tmp_path / "b"


def test_the_manifest_says_so_and_the_files_are_those_of_joint_and_tasks(builder: Any) -> None:
    variant = json.loads((builder.root / "manifest.json").read_text())["variants"][0]
    assert variant["trunk"] is None
    for task in variant["tasks"]:
        assert task["tail"] == task["graph"]
    bundle = open_bundle(builder.root)
    assert bundle.manifest.variants[0].trunk is None
    assert tuple(graph.path for graph in variant_graphs(bundle.manifest.variants[0])) == FILES
    assert {path.name for path in (builder.root / "fp32").glob("*.onnx")} == {Path(f).name for f in FILES}


@pytest.mark.parametrize("mode", [*MODES, None])
@pytest.mark.parametrize("batch", [1, 9])
def test_every_mode_answers_as_the_oracle(builder: Any, mode: str | None, batch: int) -> None:
    """float32 sums of at most 12 products, four layers deep: at most 1e-5 of the largest value off."""
    x = np.random.default_rng(batch).standard_normal((batch, 6), dtype=np.float32)
    exact = builder.oracle({"x": x})
    with te_runtime.load(builder.root, mode=mode) as model:
        for tasks in (None, ["b", "a"], ["b"]):
            found = model.predict(x, tasks)
            assert list(found) == (tasks or ["a", "b"])
            for task, (output, weights, _) in found.items():
                largest = np.abs(exact[f"{task}.prediction"]).max()
                np.testing.assert_allclose(output, exact[f"{task}.prediction"], rtol=0, atol=1e-5 * largest)
                np.testing.assert_allclose(weights, exact[f"{task}.routing_weights"], rtol=0, atol=1e-5)
        assert model.predict(x[:0], ["a"])["a"].output.shape == (0, 2)


def test_pruned_mode_says_that_there_is_none(builder: Any) -> None:
    with pytest.raises(InputError, match="has no pruned graph"):
        te_runtime.load(builder.root, mode="pruned")


def test_plans_name_the_graphs_that_open(builder: Any, tiny: ModuleType, tmp_path: Path) -> None:
    own = ("fp32/task-a.onnx", "fp32/task-b.onnx")
    for mode, graphs in (("joint", FILES[:1]), ("split", own), ("task", own)):
        with te_runtime.load(builder.root, mode=mode) as model:
            assert model.plan.graphs == graphs
    with te_runtime.load(builder.root) as model:
        assert str(model.plan) == (
            "mode split: the tasks share nothing, so each has a graph of its own and only those asked for run\n"
            "  fp32/task-a.onnx\n  fp32/task-b.onnx"
        )
    tiny.write_tiny_bundle(tmp_path / "one", outputs={"only": 2}, trunk=False)
    with te_runtime.load(tmp_path / "one") as one:
        assert (one.plan.mode, one.plan.graphs) == ("joint", ("fp32/joint.onnx",))


@pytest.mark.parametrize("mode", MODES)
def test_verify_runs_every_graph_once(builder: Any, mode: str) -> None:
    with te_runtime.load(builder.root, mode=mode) as model:
        report = model.verify()
    assert report.ok
    assert sorted(report.graph_files) == sorted(FILES)
    assert sorted(report.graphs) == sorted(FILES)
    assert "8 golden rows through 3 graphs" in "\n".join(verify_text("b", report, CPU))


@pytest.mark.parametrize("name", ["joint", "task-a"])
def test_a_graph_that_gives_other_numbers_is_named_once(tiny: ModuleType, tmp_path: Path, name: str) -> None:
    def move_bias(model: onnx.ModelProto) -> None:
        (bias,) = [tensor for tensor in model.graph.initializer if tensor.name == "a.head.b"]
        bias.CopyFrom(numpy_helper.from_array(np.full(2, 9.0, np.float32), "a.head.b"))

    root = own_copy(tiny, tmp_path)
    tiny.edit_graph(root, name, move_bias)

    with te_runtime.load(root) as model:
        report = model.verify()

    assert not report.ok
    assert {(entry.graph, entry.task) for entry in report.mismatches} == {(f"fp32/{name}.onnx", "a")}
    assert len({(e.graph, e.batch, e.row) for e in report.mismatches}) == len(report.mismatches)


def change_path(task: dict[str, Any]) -> None:
    task["tail"] = {**task["tail"], "path": "fp32/joint.onnx"}


def change_name(task: dict[str, Any]) -> None:
    task["tail"]["inputs"][0]["name"] = "experts"


def change_shape(task: dict[str, Any]) -> None:
    task["tail"]["outputs"][0]["shape"] = ["batch", 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_path, "tail of task 'a' is 'fp32/joint.onnx', expected its task graph 'fp32/task-a.onnx'"),
        (change_name, "reads 'experts', which nothing gives"),
        (change_shape, "expected float32 ('batch', 2)"),
    ],
)
def test_a_tail_that_is_not_the_task_graph_is_refused(
    tiny: ModuleType, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    root = own_copy(tiny, tmp_path)
    tiny.edit_manifest(root, lambda data: change(data["variants"][0]["tasks"][0]))

    with pytest.raises(BundleError) as caught:
        te_runtime.load(root)

    assert message in str(caught.value)


def test_a_missing_trunk_is_not_a_null_one(tiny: ModuleType, tmp_path: Path) -> None:
    root = own_copy(tiny, tmp_path)
    tiny.edit_manifest(root, lambda data: data["variants"][0].pop("trunk"))

    with pytest.raises(BundleError, match="trunk"):
        te_runtime.load(root)

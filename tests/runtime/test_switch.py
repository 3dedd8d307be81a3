"""The switch graph: one run per call, which computes the tasks asked for and no other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import te_runtime
from te_runtime.bundle import open_bundle
from te_runtime.errors import BundleError
from te_runtime.executor import SessionExecutor, open_executor
from te_runtime.session import open_session
from te_runtime.switch import SwitchExecutor, ask_for

TASKS = ("a", "b", "c")


@pytest.fixture
def root(tiny: ModuleType, tmp_path: Path) -> Path:
    tiny.write_tiny_bundle(tmp_path / "b", outputs={"a": 2, "b": 1, "c": 3})
    return tmp_path / "b"


def opened(root: Path, provider: str = "cpu") -> tuple[Any, Any]:
    bundle = open_bundle(root)
    variant = bundle.manifest.variants[0]
    return bundle, variant


def test_one_session_answers_every_choice(root: Path) -> None:
    bundle, variant = opened(root)
    executor = open_executor(bundle, variant, "split", provider="cpu", threads=1)
    assert isinstance(executor, SwitchExecutor)
    with te_runtime.load(root, threads=1) as model:
        assert model.plan.graphs == ("fp32/switch.onnx",)
        assert "one session" in model.plan.reason


def test_only_what_is_asked_for_is_computed(root: Path) -> None:
    bundle, variant = opened(root)
    session = open_session(bundle.path(variant.switch.path), variant.switch, provider="cpu", threads=1)
    x = np.ones((4, 6), dtype=np.float32)
    found = session.run({"x": x, "asked": np.array([False, True, False])})
    rows = {spec.name: len(array) for spec, array in zip(variant.switch.outputs, found, strict=True)}
    assert {name.partition(".")[0]: count for name, count in rows.items()} == {"a": 0, "b": 4, "c": 0}
    asked = ask_for(("c", "a"), session, TASKS)
    assert [spec.name for spec in asked.spec.outputs] == [
        f"{task}.{output}" for task in ("c", "a") for output in ("prediction", "routing_weights")
    ]
    assert [spec.name for spec in asked.spec.inputs] == ["x"]
    assert [len(array) for array in asked.run({"x": x})] == [4] * 4


def test_every_choice_and_order_gets_the_same_answers(root: Path) -> None:
    x = np.random.default_rng(3).standard_normal((5, 6), dtype=np.float32)
    with te_runtime.load(root, threads=1) as model:
        whole = model.predict(x)
        for tasks in (["a"], ["b"], ["c"], ["c", "a"], ["b", "c", "a"], ["a", "b"]):
            found = model.predict(x, tasks)
            assert list(found) == tasks
            for task in tasks:
                np.testing.assert_array_equal(found[task].output, whole[task].output)
                np.testing.assert_array_equal(found[task].routing_weights, whole[task].routing_weights)
        assert model.predict(x[:0], ["b"])["b"].output.shape == (0, 1)
        counted = {task: used.rows for task, used in model.utilization().items()}
        assert counted == {"a": 5 * 5, "b": 4 * 5, "c": 4 * 5}


def test_threads_may_ask_for_different_tasks(root: Path) -> None:
    x = np.random.default_rng(4).standard_normal((3, 6), dtype=np.float32)
    choices = [["a"], ["b", "a"], ["c"], ["a", "b", "c"]]
    with te_runtime.load(root, threads=1) as model, ThreadPoolExecutor(4) as pool:
        whole = model.predict(x)

        def call(number: int) -> bool:
            tasks = choices[number % len(choices)]
            found = model.predict(x, tasks)
            same = all(np.array_equal(found[task].output, whole[task].output) for task in tasks)
            return same and list(found) == tasks

        assert all(pool.map(call, range(400)))


def test_batches_that_are_cut_are_joined(root: Path) -> None:
    x = np.random.default_rng(5).standard_normal((9, 6), dtype=np.float32)
    with te_runtime.load(root, threads=1) as whole, te_runtime.load(root, threads=1, max_batch=4) as cut:
        np.testing.assert_allclose(cut.predict(x, ["c"])["c"].output, whole.predict(x)["c"].output, rtol=1e-5)


def test_a_bundle_without_one_runs_trunk_and_tails(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.write_tiny_bundle(tmp_path / "b", switch=False)
    bundle, variant = opened(tmp_path / "b")
    assert variant.switch is None
    executor = open_executor(bundle, variant, "split", provider="cpu", threads=1)
    assert isinstance(executor, SessionExecutor)
    with te_runtime.load(tmp_path / "b", threads=1) as model:
        assert model.plan.graphs == ("fp32/trunk.onnx", "fp32/tail-task_0.onnx", "fp32/tail-task_1.onnx")
        assert 'mode="joint"' in model.plan.reason
        assert model.verify().ok


def test_two_inputs_and_no_gate(tiny: ModuleType, tmp_path: Path) -> None:
    builder = tiny.TinyBundle(tiny.TinyOptions(two_inputs=True, gated=False))
    builder.write(tmp_path / "b")
    feeds = {s.name: np.ones((2, s.shape[1]), dtype=np.float32) for s in builder.inputs}
    with te_runtime.load(tmp_path / "b", threads=1) as model:
        found = model.predict(feeds, ["task_1"])["task_1"]
    assert found.routing_weights is None
    np.testing.assert_allclose(found.output, builder.oracle(feeds)["task_1.prediction"], rtol=1e-4)


def test_a_switch_that_answers_what_was_not_asked_is_harmless_and_one_that_does_not_answer_is_refused(
    root: Path, tiny: ModuleType
) -> None:
    """Its conditions changed places: what was asked for comes without rows."""

    def swap(model: Any) -> None:
        nodes = [node for node in model.graph.node if node.op_type == "If"]
        nodes[0].input[0], nodes[1].input[0] = nodes[1].input[0], nodes[0].input[0]

    tiny.edit_graph(root, "switch", swap)
    with te_runtime.load(root, threads=1) as model:
        with pytest.raises(
            BundleError, match=r"fp32/switch\.onnx: gave 'a\.prediction' of task 'a' for 2 rows"
        ):
            model.predict(np.ones((2, 6)), ["a"])
        with pytest.raises(BundleError, match=r"fp32/switch\.onnx: gave"):
            model.verify()


def edit_switch(data: dict[str, Any], **changes: Any) -> None:
    data["variants"][0]["switch"].update(changes)


def asked_of(data: dict[str, Any]) -> dict[str, Any]:
    return next(spec for spec in data["variants"][0]["switch"]["inputs"] if spec["name"] == "asked")


HOSTILE = {
    "no choice": (lambda d: d["variants"][0]["switch"]["inputs"].pop(), "does not read 'asked'"),
    "a choice of fewer": (lambda d: asked_of(d).update(shape=[2]), "a bool for each of 3 tasks"),
    "a choice of any": (lambda d: asked_of(d).update(shape=["batch"]), "a bool for each of 3 tasks"),
    "a choice of numbers": (lambda d: asked_of(d).update(dtype="float32"), "does not read 'asked'"),
    "another input": (
        lambda d: d["variants"][0]["switch"]["inputs"].append(
            {"name": "more", "dtype": "bool", "shape": [3]}
        ),
        "reads 'more', which nothing gives",
    ),
    "an output less": (lambda d: d["variants"][0]["switch"]["outputs"].pop(), "does not give 'c.routing"),
    "an output more": (
        lambda d: d["variants"][0]["switch"]["outputs"].append(
            {"name": "d.prediction", "dtype": "float32", "shape": ["batch", 2]}
        ),
        "gives 7 outputs, expected 6",
    ),
    "another shape": (
        lambda d: d["variants"][0]["switch"]["outputs"][0].update(shape=["batch", 9]),
        "'a.prediction' of graph 'fp32/switch.onnx' is float32",
    ),
    "another graph's file": (
        lambda d: edit_switch(d, path="fp32/joint.onnx"),
        "uses 'fp32/joint.onnx' twice",
    ),
    "a file outside": (lambda d: edit_switch(d, path="../switch.onnx"), "is not allowed"),
    "a file not listed": (lambda d: edit_switch(d, path="fp32/other.onnx"), "used but not listed"),
    "missing": (lambda d: d["variants"][0].pop("switch"), "switch"),
    "the model's input": (
        lambda d: d["inputs"].append({"name": "asked", "dtype": "bool", "shape": ["batch"]}),
        "does not read 'asked'",
    ),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_manifest_is_refused(root: Path, tiny: ModuleType, attack: str) -> None:
    edit, message = HOSTILE[attack]
    tiny.edit_manifest(root, edit)
    with pytest.raises(BundleError, match=message):
        te_runtime.load(root, threads=1)


@pytest.mark.parametrize("damage", ["removed", "other bytes", "not a graph"])
def test_a_file_that_is_not_the_one_listed_is_refused(root: Path, tiny: ModuleType, damage: str) -> None:
    path = root / "fp32" / "switch.onnx"
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(bytes(path.stat().st_size))
        if damage == "not a graph":
            tiny.rehash(root)
    with pytest.raises(BundleError, match=r"switch\.onnx"):
        te_runtime.load(root, threads=1)

"""A bundle with a pruned graph for one of its two tasks: mode pruned, verify, inspect, and manifests that lie."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import te_runtime
from te_runtime.bundle import open_bundle
from te_runtime.describe import bundle_json, bundle_text
from te_runtime.errors import BundleError, InputError
from te_runtime.interfaces import check_interfaces, variant_graphs
from te_runtime.manifest import (
    GroupParity,
    Manifest,
    OutputParity,
    PrunedGraph,
    TaskAccuracy,
    TaskParity,
    parse_manifest,
    seal_manifest,
    serialize_manifest,
)
from te_runtime.open_device import open_device_executor
from te_runtime.plan import choose_plan

GONE = 1
OUTPUTS = {"a": 2, "b": 3}


class PrunedBundle:
    """A tiny bundle, written; expert 1 of task a answers 0 in its pruned graph.

    Attributes:
        whole, pruned: oracles, feeds → arrays by their name in golden.npz.
    """

    def __init__(self, tiny: ModuleType, root: Path) -> None:
        self.root = root
        builder, shadow = (tiny.TinyBundle(tiny.TinyOptions(outputs=OUTPUTS)) for _ in range(2))
        manifest = builder.write(root)
        columns = slice(GONE * tiny.WIDTH, (GONE + 1) * tiny.WIDTH)
        shadow.weights["experts.w"][:, columns] = 0
        shadow.weights["experts.b"][columns] = 0
        self.whole, self.pruned = builder.oracle, shadow.oracle
        task = builder.tasks[0]
        nodes = [*shadow._trunk_nodes(), *shadow._tail_nodes("a", "")]
        own = shadow._promises(task, "")
        graph = shadow._graph(root, "pruned-a", shadow.inputs, own, nodes, inline=True)
        with np.load(root / "golden.npz", allow_pickle=False) as golden:
            feeds = {"x": golden["input.x"]}
        parity = [
            far_from(self.whole(feeds)[name], self.pruned(feeds)[name], tiny.GROUPS)
            for name in ("a.prediction", "a.routing_weights")
        ]
        entry = PrunedGraph(graph, (GONE,), (0.01,), lost("a"), TaskParity("a", *parity))
        (variant,) = manifest.variants
        first, second = variant.tasks
        variant = variant._replace(tasks=(first._replace(pruned=entry), second))
        self.manifest: Manifest = manifest._replace(variants=(variant,), files=tiny.list_files(root))
        (root / "manifest.json").write_bytes(serialize_manifest(self.manifest))

    @property
    def data(self) -> bytes:
        return (self.root / "manifest.json").read_bytes()


def lost(task: str) -> TaskAccuracy:
    return TaskAccuracy(
        task, "calibration data", 16, "agreement", 0.25, 0.5, None, None, 0.9975, 0.01, 0.001, 1.0
    )


def far_from(exact: np.ndarray, found: np.ndarray, groups: tuple[Any, ...]) -> OutputParity:
    """Twice the error of the pruned function, and what float32 is allowed (tiny_bundle says why 1e-5)."""
    made, start = [], 0
    for group in groups:
        own = slice(start, start + group.rows)
        error = float(np.abs(exact[own] - found[own]).max())
        bound = 2 * error + 1e-5 * float(np.abs(exact[own]).max())
        made.append(GroupParity(group.name, group.rows, error, 1e-7, bound))
        start += group.rows
    return OutputParity(1.0, 1.0, 1e-7, 1e-7, None, 1.0, 1e-7, 1.0, 1.0, tuple(made))


@pytest.fixture(scope="module")
def shared(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> PrunedBundle:
    """Not to be changed."""
    return PrunedBundle(tiny, tmp_path_factory.mktemp("pruned") / "tiny-onnx")


@pytest.fixture
def own(tiny: ModuleType, tmp_path: Path) -> PrunedBundle:
    return PrunedBundle(tiny, tmp_path / "tiny-onnx")


def rows(batch: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(batch).normal(size=(batch, 6)).astype(np.float32)}


def test_the_manifest_is_read_back(shared: PrunedBundle) -> None:
    manifest = parse_manifest(shared.data, "manifest.json")
    assert manifest.variants == shared.manifest.variants
    check_interfaces(manifest, "manifest.json")
    assert "fp32/pruned-a.onnx" in manifest.referenced_paths()
    assert "fp32/pruned-a.onnx" in [graph.path for graph in variant_graphs(manifest.variants[0])]


def test_the_plan_names_a_task_graph_where_there_is_no_pruned_one(shared: PrunedBundle) -> None:
    plan = choose_plan(shared.manifest.variants[0], "pruned")
    assert plan == ("pruned", ("fp32/pruned-a.onnx", "fp32/task-b.onnx"), "asked for")
    assert choose_plan(shared.manifest.variants[0], None).mode == "split"


@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("kind", ["session", "device"])
def test_a_task_answers_by_its_pruned_graph_if_it_has_one(
    shared: PrunedBundle, batch: int, kind: str
) -> None:
    feeds = rows(batch)
    if kind == "session":
        with te_runtime.load(shared.root, mode="pruned") as model:
            assert model.plan.mode == "pruned"
            found = model.predict(feeds, ["b", "a"])
    else:
        bundle = open_bundle(shared.root)
        executor = open_device_executor(
            bundle, bundle.manifest.variants[0], "pruned", provider="cpu", threads=1
        )
        found = executor.run(feeds, batch, ["b", "a"])
    for task, oracle in (("a", shared.pruned(feeds)), ("b", shared.whole(feeds))):
        exact = oracle[f"{task}.prediction"]
        assert np.abs(found[task].output - exact).max() <= 1e-5 * np.abs(exact).max()
        assert found[task].routing_weights.shape == (batch, 3)
        np.testing.assert_allclose(found[task].routing_weights, oracle[f"{task}.routing_weights"], atol=1e-5)


@pytest.mark.parametrize("mode", ["joint", "split", "task"])
def test_other_modes_give_the_whole_function(shared: PrunedBundle, mode: str) -> None:
    feeds = rows(4)
    with te_runtime.load(shared.root, mode=mode) as model:
        found = model.predict(feeds)["a"].output
    exact = shared.whole(feeds)["a.prediction"]
    assert np.abs(found - exact).max() <= 1e-5 * np.abs(exact).max()
    assert np.abs(found - shared.pruned(feeds)["a.prediction"]).max() > 1e-3


def test_a_bundle_without_any_is_told_how_to_get_one(pristine: Path) -> None:
    fix = r"variant fp32 has no pruned graph: export with --prune-experts POINTS .* or take mode \"task\""
    with pytest.raises(InputError, match=fix):
        te_runtime.load(pristine, mode="pruned")


@pytest.mark.parametrize("mode", ["split", "pruned"])
def test_verify_holds_pruned_graphs_to_their_own_bounds(shared: PrunedBundle, mode: str) -> None:
    with te_runtime.load(shared.root, mode=mode) as model:
        report = model.verify()
    assert report.ok
    assert "fp32/pruned-a.onnx" in report.graphs
    assert sorted(report.graph_files) == sorted(
        graph.path for graph in variant_graphs(shared.manifest.variants[0])
    )


def test_verify_names_a_pruned_graph_that_is_further_off_than_its_bounds(
    own: PrunedBundle, tiny: ModuleType
) -> None:
    def tighten(manifest: dict[str, Any]) -> None:
        parity = manifest["variants"][0]["tasks"][0]["pruned"]["parity"]["prediction"]
        for group in parity["groups"]:
            group["bound"] = 1e-6

    tiny.edit_manifest(own.root, tighten)
    with te_runtime.load(own.root) as model:
        report = model.verify()
    assert not report.ok
    assert {mismatch.graph for mismatch in report.mismatches} == {"fp32/pruned-a.onnx"}
    assert {(mismatch.task, mismatch.output) for mismatch in report.mismatches} == {("a", "prediction")}


def test_verify_needs_a_bound_for_every_group(own: PrunedBundle, tiny: ModuleType) -> None:
    def drop(manifest: dict[str, Any]) -> None:
        manifest["variants"][0]["tasks"][0]["pruned"]["parity"]["prediction"]["groups"].pop()

    tiny.edit_manifest(own.root, drop)
    with (
        te_runtime.load(own.root) as model,
        pytest.raises(
            BundleError, match=r"fp32 pruned a\.prediction has no bound for the golden rows 'large'"
        ),
    ):
        model.verify()


def test_inspect_says_what_is_gone_and_what_it_costs(shared: PrunedBundle) -> None:
    bundle = open_bundle(shared.root)
    line = "pruned     a: experts 1 of 3 are gone in mode pruned; it loses 0.25 of 0.5 points allowed"
    assert line in list(bundle_text(bundle))
    assert json.loads(json.dumps(bundle_json(bundle)))["variants"][0]["pruned"] == {
        "a": {"experts": [1], "loss_points": 0.25}
    }


def pruned_entry(manifest: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = manifest["variants"][0]["tasks"][0]["pruned"]
    return entry


EDITS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("no expert", lambda p: p.update(experts=[], largest_weights=[]), "expected ascending numbers from 0"),
    ("descending", lambda p: p.update(experts=[1, 0], largest_weights=[0, 0]), "expected ascending"),
    ("twice", lambda p: p.update(experts=[1, 1], largest_weights=[0, 0]), "expected ascending"),
    ("below zero", lambda p: p.update(experts=[-1]), "expected ascending"),
    ("out of range", lambda p: p.update(experts=[3]), "is without experts (3,) of 3: one at least"),
    ("all", lambda p: p.update(experts=[0, 1, 2], largest_weights=[0, 0, 0]), "one at least must be left"),
    ("weights missing", lambda p: p.update(largest_weights=[]), "expected one from 0 to 1 per expert"),
    ("weight above 1", lambda p: p.update(largest_weights=[1.5]), "expected one from 0 to 1 per expert"),
    ("weight below 0", lambda p: p.update(largest_weights=[-0.1]), "expected one from 0 to 1 per expert"),
    (
        "accuracy of another",
        lambda p: p["accuracy"].update(task="b"),
        "accuracy of 'fp32/pruned-a.onnx' is of",
    ),
    (
        "parity of another",
        lambda p: p["parity"].update(task="b"),
        "parity of 'fp32/pruned-a.onnx' is of task",
    ),
    ("not listed", lambda p: p["graph"].update(path="fp32/pruned-z.onnx"), "is used but not listed in files"),
    ("path", lambda p: p["graph"].update(path="../pruned-a.onnx"), "is not allowed"),
    ("unknown key", lambda p: p.update(extra=1), "unknown key 'extra'"),
    ("missing key", lambda p: p.pop("accuracy"), "key 'accuracy' is missing"),
]


def edited(data: bytes, edit: Callable[[dict[str, Any]], object]) -> bytes:
    manifest = json.loads(data)
    edit(pruned_entry(manifest))
    return seal_manifest(json.dumps(manifest).encode())


@pytest.mark.parametrize(("edit", "message"), [edit[1:] for edit in EDITS], ids=[edit[0] for edit in EDITS])
def test_a_wrong_entry_is_refused(
    shared: PrunedBundle, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(BundleError, match=re.escape(message)) as caught:
        parse_manifest(edited(shared.data, edit), "here/manifest.json")
    assert str(caught.value).startswith("here/manifest.json: ")
    assert len(str(caught.value)) < 700


MISFITS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("task graph", lambda p: p["graph"].update(path="fp32/task-a.onnx"), "uses 'fp32/task-a.onnx' twice"),
    ("another folder", lambda p: p["graph"].update(path="golden.npz"), "not in folder 'fp32'"),
    (
        "output's name",
        lambda p: p["graph"]["outputs"][0].update(name="no"),
        "expected 'prediction' of task 'a'",
    ),
    ("output's shape", lambda p: p["graph"]["outputs"][1].update(shape=["batch", 2]), "expected float32"),
    ("input's name", lambda p: p["graph"]["inputs"][0].update(name="no"), "reads 'no', which nothing gives"),
    ("output too many", lambda p: p["graph"]["outputs"].append(p["graph"]["outputs"][0]), "gives 3 outputs"),
]


@pytest.mark.parametrize(
    ("edit", "message"), [edit[1:] for edit in MISFITS], ids=[edit[0] for edit in MISFITS]
)
def test_a_pruned_graph_that_does_not_fit_is_refused(
    shared: PrunedBundle, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    manifest = parse_manifest(edited(shared.data, edit), "manifest.json")
    with pytest.raises(BundleError, match=re.escape(message)):
        check_interfaces(manifest, "here/manifest.json")


def test_a_task_without_a_gate_has_no_experts_to_lose(shared: PrunedBundle) -> None:
    manifest = json.loads(shared.data)
    manifest["tasks"][0]["routing_weights"] = None
    with pytest.raises(BundleError, match=r"is without experts \(1,\) of 0"):
        parse_manifest(seal_manifest(json.dumps(manifest).encode()), "manifest.json")

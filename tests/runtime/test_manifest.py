from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from te_runtime.errors import BundleError
from te_runtime.interfaces import check_interfaces, variant_graphs
from te_runtime.manifest import is_task_name, parse_manifest, seal_manifest, serialize_manifest


@pytest.fixture(scope="module")
def data(pristine: Path) -> bytes:
    return (pristine / "manifest.json").read_bytes()


def test_a_manifest_is_read_back_to_the_byte(data: bytes) -> None:
    assert serialize_manifest(parse_manifest(data, "manifest.json")) == data


def test_a_manifest_that_could_not_be_read_is_not_written(data: bytes) -> None:
    manifest = parse_manifest(data, "manifest.json")
    for change in ({"unused_parameters": ("a\nb",)}, {"config": {"k": 2**64}}, {"family": "\x1b[31m"}):
        with pytest.raises(BundleError, match=r"manifest\.json: model\."):
            serialize_manifest(manifest._replace(model=manifest.model._replace(**change)))


def test_what_a_manifest_tells(data: bytes) -> None:
    manifest = parse_manifest(data, "manifest.json")
    assert manifest.task_names == ("task_0", "task_1")
    assert manifest.file("golden.npz").size_bytes > 0
    paths = [graph.path for graph in variant_graphs(manifest.variants[0])]
    assert paths[:2] == ["fp32/joint.onnx", "fp32/trunk.onnx"]
    assert set(paths) < set(manifest.referenced_paths())


@pytest.mark.parametrize("name", ["a", "task_0", "A-b", "x" * 64])
def test_names_a_task_may_have(name: str) -> None:
    assert is_task_name(name)


@pytest.mark.parametrize("name", ["", "x" * 65, "a.b", "a/b", "a b", "ä", "a\n", ".."])
def test_names_a_task_may_not_have(name: str) -> None:
    assert not is_task_name(name)


def edited(data: bytes, edit: Callable[[dict[str, Any]], object]) -> bytes:
    manifest = json.loads(data)
    edit(manifest)
    return seal_manifest(json.dumps(manifest).encode())


EDITS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("version", lambda m: m.update(version=2), "version 2, this te_runtime reads version 1"),
    ("format", lambda m: m.update(format="zip"), "not a te-export bundle"),
    ("unknown key", lambda m: m.update(extra=1), "unknown key 'extra'"),
    ("missing key", lambda m: m.pop("golden"), "key 'golden' is missing"),
    ("no tasks", lambda m: m.update(tasks=[]), "tasks is empty"),
    ("no inputs", lambda m: m.update(inputs=[]), "inputs is empty"),
    ("no variants", lambda m: m.update(variants=[]), "variants is empty"),
    ("task twice", lambda m: m["tasks"][1].update(name="TASK_0"), "stands twice"),
    ("task name", lambda m: m["tasks"][1].update(name="a/b"), "task name 'a/b' is not allowed"),
    ("tasks of variant", lambda m: m["variants"][0]["tasks"].reverse(), "tasks of variant fp32"),
    ("parity of variant", lambda m: m["variants"][0]["parity"].pop(), "parity of variant fp32"),
    ("file not listed", lambda m: m["files"].pop(), "is used but not listed in files"),
    ("file twice", lambda m: m["files"].append(dict(m["files"][0])), "stands twice"),
    ("hash", lambda m: m["files"][0].update(sha256="0" * 63), "64 hex digits"),
    ("upper-case hash", lambda m: m["files"][0].update(sha256="A" * 64), "64 hex digits"),
    ("size below zero", lambda m: m["files"][0].update(size_bytes=-1), "out of bounds"),
    ("huge size", lambda m: m["files"][0].update(size_bytes=10**18), "out of bounds"),
    ("axis of zero", lambda m: m["inputs"][0].update(shape=["batch", 0]), "out of bounds"),
    ("axis of no name", lambda m: m["inputs"][0].update(shape=["", 6]), "out of bounds"),
    ("dtype", lambda m: m["inputs"][0].update(dtype="float31"), "inputs[0].dtype"),
    ("utilization of no task", lambda m: m["utilization"][0].update(task="t"), "'t', which is no task"),
    ("utilization twice", lambda m: m["utilization"].append(dict(m["utilization"][0])), "stands twice"),
    ("golden rows", lambda m: m["golden"]["groups"][0].update(rows=0), "has 0 rows"),
]
EDITS += [
    (f"path {path!r:.30}", lambda m, path=path: m["files"][0].update(path=path), "is not allowed")
    for path in (
        "../a",
        "/a",
        "a/../b",
        "a//b",
        "",
        ".",
        "a/",
        "C:/a",
        "a\\b",
        "~/a",
        ".hidden",
        "é",
        "a" * 241,
    )
]


@pytest.mark.parametrize(("edit", "message"), [edit[1:] for edit in EDITS], ids=[edit[0] for edit in EDITS])
def test_a_wrong_value_is_refused(
    data: bytes, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(BundleError, match=re.escape(message)) as caught:
        parse_manifest(edited(data, edit), "here/manifest.json")
    assert str(caught.value).startswith("here/manifest.json: ")
    assert len(str(caught.value)) < 700


def test_text_that_is_no_manifest_is_refused() -> None:
    for found in (b"", b"{}", b"\xff\xfe", b"PK\x03\x04", b"\xef\xbb\xbf{}", b'{"version": 1}'):
        with pytest.raises(BundleError, match=r"manifest\.json"):
            parse_manifest(found, "manifest.json")


def graph(m: dict[str, Any], name: str) -> dict[str, Any]:
    variant = m["variants"][0]
    return variant[name] if name in variant else variant["tasks"][0][name]


MISFITS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    (
        "another task's tail",
        lambda m: graph(m, "tail").update(path=m["variants"][0]["tasks"][1]["tail"]["path"]),
        "uses 'fp32/tail-task_1.onnx' twice",
    ),
    (
        "tail is the task graph",
        lambda m: m["variants"][0]["tasks"][0].update(tail=m["variants"][0]["tasks"][0]["graph"]),
        "uses 'fp32/task-task_0.onnx' twice",
    ),
    ("no trunk", lambda m: m["variants"][0].update(trunk=None), "where trunk is null or there is one task"),
    (
        "no trunk for the tails",
        lambda m: m["variants"][0].update(trunk=None, joint_tails=None),
        "reads 'experts', which nothing gives",
    ),
    (
        "joint tails of one task",
        lambda m: graph(m, "joint_tails").update(outputs=graph(m, "joint_tails")["outputs"][:2]),
        "graph 'fp32/joint-tails.onnx' does not give 'task_1.prediction'",
    ),
    (
        "joint tails that read what nothing gives",
        lambda m: graph(m, "joint_tails")["inputs"][0].update(name="features"),
        "graph 'fp32/joint-tails.onnx' reads 'features', which nothing gives",
    ),
    (
        "joint tails are the joint graph",
        lambda m: m["variants"][0].update(joint_tails=m["variants"][0]["joint"]),
        "uses 'fp32/joint.onnx' twice",
    ),
    (
        "tail as graph",
        lambda m: graph(m, "graph").update(path="fp32/weights.bin"),
        "uses 'fp32/weights.bin' twice",
    ),
    ("another folder", lambda m: graph(m, "trunk").update(path="golden.npz"), "not in folder 'fp32'"),
    ("precision", lambda m: m["variants"][0].update(precision="int8"), "not in folder 'int8'"),
    (
        "unknown input",
        lambda m: graph(m, "tail")["inputs"][0].update(name="no"),
        "reads 'no', which nothing gives",
    ),
    ("input's shape", lambda m: m["inputs"][0].update(shape=["batch", 7]), "expected float32 ('batch', 7)"),
    ("input's dtype", lambda m: graph(m, "joint")["inputs"][0].update(dtype="float64"), "is float64"),
    ("no batch axis", lambda m: m["inputs"][0].update(shape=[1, 6]), "expected 'batch' first"),
    (
        "open output",
        lambda m: m["tasks"][0]["prediction"].update(shape=["batch", "n"]),
        "and numbers after it",
    ),
    ("output's shape", lambda m: m["tasks"][0]["prediction"].update(shape=["batch", 3]), "expected float32"),
    ("no routing", lambda m: m["tasks"][0].update(routing_weights=None), "outputs, expected"),
    ("output's name", lambda m: graph(m, "tail")["outputs"][0].update(name="no"), "expected 'prediction'"),
    ("joint's name", lambda m: graph(m, "joint")["outputs"][0].update(name="no"), "give 'task_0.prediction'"),
    ("trunk's name", lambda m: graph(m, "trunk")["outputs"][0].update(name="x"), "have one name"),
    (
        "input twice",
        lambda m: graph(m, "tail")["inputs"].append(graph(m, "tail")["inputs"][0]),
        "two inputs of graph",
    ),
]


@pytest.mark.parametrize(
    ("edit", "message"), [edit[1:] for edit in MISFITS], ids=[edit[0] for edit in MISFITS]
)
def test_graphs_that_do_not_fit_are_refused(
    data: bytes, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    manifest = parse_manifest(edited(data, edit), "manifest.json")
    with pytest.raises(BundleError, match=re.escape(message)) as caught:
        check_interfaces(manifest, "here/manifest.json")
    assert str(caught.value).startswith("here/manifest.json: ")

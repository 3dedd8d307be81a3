"""The manifest's latency: what may be left out, what is kept to the digit, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from te_runtime.errors import BundleError
from te_runtime.manifest import (
    GraphLatency,
    Latency,
    Manifest,
    parse_manifest,
    seal_manifest,
    serialize_manifest,
)

JOINT = GraphLatency("fp32/joint.onnx", 8, 120.5, 118.0, 131.25, 400, 1.0)
TASK = GraphLatency("fp32/task-task_1.onnx", 1, 12.0, 12.0, 12.0, 1, 1.0)
MEASURED = Latency("A CPU (R) of 2.9 GHz", "1.31.1", "cpu", 1, (JOINT, TASK))
TIMES_US = st.floats(min_value=1e-3, max_value=1e12)


@pytest.fixture(scope="module")
def manifest(pristine: Path) -> Manifest:
    return parse_manifest((pristine / "manifest.json").read_bytes(), "manifest.json")


def as_object(manifest: Manifest) -> dict[str, Any]:
    parsed = json.loads(serialize_manifest(manifest))
    assert isinstance(parsed, dict)
    return parsed


def read(changed: dict[str, Any]) -> Manifest:
    return parse_manifest(seal_manifest(json.dumps(changed).encode()), "here/manifest.json")


def test_not_measured_is_null_and_a_manifest_from_before_has_no_key(manifest: Manifest) -> None:
    changed = as_object(manifest)
    assert changed.pop("latency", "no key") is None
    assert read(changed)._replace(checksum="") == manifest._replace(checksum="")


def test_figures_are_read_back(manifest: Manifest) -> None:
    data = serialize_manifest(manifest._replace(latency=MEASURED))
    found = parse_manifest(data, "manifest.json")
    assert found.latency == MEASURED
    assert serialize_manifest(found) == data


@given(
    times=st.tuples(TIMES_US, TIMES_US, TIMES_US).map(sorted),
    batch=st.integers(1, 2**31 - 1),
    rounds=st.integers(1, 10**6),
)
@settings(max_examples=50, deadline=None)
def test_any_figures_in_bounds_are_read_back(
    manifest: Manifest, times: list[float], batch: int, rounds: int
) -> None:
    low, middle, high = times
    entry = GraphLatency("fp32/joint.onnx", batch, middle, low, high, rounds, 1.0)
    measured = MEASURED._replace(graphs=(entry,))
    data = serialize_manifest(manifest._replace(latency=measured))
    assert parse_manifest(data, "manifest.json").latency == measured


def latency(m: dict[str, Any], **values: object) -> None:
    m["latency"].update(values)


def entry(m: dict[str, Any], **values: object) -> None:
    m["latency"]["graphs"][0].update(values)


ATTACKS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("another type", lambda m: m.update(latency=[]), "latency: expected object, found array"),
    ("unknown key", lambda m: latency(m, host="h"), "latency: unknown key 'host'"),
    ("missing key", lambda m: m["latency"].pop("threads"), "latency: key 'threads' is missing"),
    ("no machine", lambda m: latency(m, machine=""), "must have 1 to 200 characters"),
    ("long machine", lambda m: latency(m, machine="x" * 201), "must have 1 to 200 characters"),
    ("control character", lambda m: latency(m, machine="\x1b[31m"), "cannot be printed"),
    ("long version", lambda m: latency(m, onnxruntime="1" * 201), "must have 1 to 200 characters"),
    ("provider", lambda m: latency(m, provider="tpu"), "latency.provider: expected 'cpu' or 'cuda'"),
    ("no threads", lambda m: latency(m, threads=0), "threads are out of bounds"),
    ("many threads", lambda m: latency(m, threads=4097), "threads are out of bounds"),
    ("part of a thread", lambda m: latency(m, threads=1.5), "latency.threads: expected integer"),
    ("no graphs", lambda m: latency(m, graphs=[]), "graphs is empty"),
    ("graph twice", lambda m: m["latency"]["graphs"].append(m["latency"]["graphs"][0]), "stands twice"),
    ("unknown key of a graph", lambda m: entry(m, p99_us=1.0), "unknown key 'p99_us'"),
    ("missing key of a graph", lambda m: m["latency"]["graphs"][0].pop("ratio"), "key 'ratio' is missing"),
    ("path out of the bundle", lambda m: entry(m, path="../joint.onnx"), "is not allowed"),
    ("no graph", lambda m: entry(m, path="fp32/none.onnx"), "no joint graph and no task graph"),
    ("no such kind", lambda m: entry(m, path="fp32/trunk.onnx"), "no joint graph and no task graph"),
    ("weights", lambda m: entry(m, path="fp32/weights.bin"), "no joint graph and no task graph"),
    ("batch of none", lambda m: entry(m, batch=0), "batch of 'fp32/joint.onnx' at batch 0 is out of bounds"),
    ("huge batch", lambda m: entry(m, batch=2**31), "is out of bounds"),
    ("no rounds", lambda m: entry(m, rounds=0), "rounds of 'fp32/joint.onnx' at batch 8 are out of bounds"),
    ("many rounds", lambda m: entry(m, rounds=10**6 + 1), "are out of bounds"),
    ("time of zero", lambda m: entry(m, p10_us=0.0), "expected 0 < p10_us <= p50_us <= p90_us"),
    ("negative time", lambda m: entry(m, p50_us=-1.0), "expected 0 < p10_us <= p50_us <= p90_us"),
    ("huge time", lambda m: entry(m, p90_us=1e13), "expected 0 < p10_us <= p50_us <= p90_us"),
    ("order of times", lambda m: entry(m, p10_us=125.0), "expected 0 < p10_us <= p50_us <= p90_us"),
    ("a time as text", lambda m: entry(m, p50_us="1"), "latency.graphs[0].p50_us: expected number"),
    ("a time as null", lambda m: entry(m, p50_us=None), "latency.graphs[0].p50_us: expected number"),
    ("NaN", lambda m: entry(m, p90_us=float("nan")), "NaN is not allowed"),
    ("infinite", lambda m: entry(m, p90_us=float("inf")), "Infinity is not allowed"),
    ("ratio of zero", lambda m: entry(m, ratio=0), "ratio of 'fp32/joint.onnx' at batch 8 is out of bounds"),
    ("negative ratio", lambda m: entry(m, ratio=-1.0), "is out of bounds"),
    ("fp32 against another", lambda m: entry(m, ratio=0.5), "ratio 0.5, expected 1 for fp32"),
]


@pytest.mark.parametrize(
    ("edit", "message"), [attack[1:] for attack in ATTACKS], ids=[attack[0] for attack in ATTACKS]
)
def test_what_is_no_latency_is_refused(
    manifest: Manifest, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    changed = as_object(manifest._replace(latency=MEASURED))
    edit(changed)
    with pytest.raises(BundleError, match=re.escape(message)) as caught:
        read(changed)
    assert str(caught.value).startswith("here/manifest.json: ")
    assert len(str(caught.value)) < 700


def test_another_variant_may_have_any_ratio(manifest: Manifest) -> None:
    changed = as_object(manifest._replace(latency=MEASURED))
    changed["variants"][0]["precision"] = "int8"
    entry(changed, ratio=0.25)
    found = read(changed).latency
    assert found is not None
    assert found.graphs[0].ratio == 0.25

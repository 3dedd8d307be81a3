from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from te_runtime.bundle import Bundle, open_bundle
from te_runtime.describe import bundle_json, bundle_text, shown_bytes
from te_runtime.manifest_latency import GraphLatency, Latency

MEASURED = Latency(
    "A CPU",
    "1.31.1",
    "cpu",
    1,
    (
        GraphLatency("fp32/joint.onnx", 64, 4512.0, 4400.0, 5000.0, 40, 1.0),
        GraphLatency("fp32/joint.onnx", 1, 310.4, 300.0, 330.0, 40, 1.0),
        GraphLatency("fp32/task-task_1.onnx", 1, 12.0, 12.0, 12.0, 1, 1.0),
        GraphLatency("int8/joint.onnx", 1, 120.0, 110.0, 130.0, 40, 0.387),
    ),
)


@pytest.fixture
def timed(bundle: Path) -> Bundle:
    opened = open_bundle(bundle)
    [fp32] = opened.manifest.variants
    int8 = fp32._replace(precision="int8", joint=fp32.joint._replace(path="int8/joint.onnx"))
    manifest = opened.manifest._replace(latency=MEASURED, variants=(fp32, int8))
    return dataclasses.replace(opened, manifest=manifest)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (8_123_000, "8.1 MB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert shown_bytes(size_bytes) == text


def test_latency_measured_at_export_is_told_for_all_tasks(timed: Bundle) -> None:
    found = [line for line in bundle_text(timed) if "onnxruntime 1.31.1, cpu" in line or "latency" in line]
    assert found == [
        "latency    fp32, all tasks: 1 row 0.31 ms, 64 rows 4.51 ms",
        "latency    int8, all tasks (over fp32): 1 row 0.12 ms (0.39x)",
        "           medians when it was exported, on A CPU, onnxruntime 1.31.1, cpu, 1 thread; te-runtime bench measures "
        "here",
    ]


def test_latency_as_json_has_every_graph(timed: Bundle) -> None:
    found = bundle_json(timed)["latency"]
    assert isinstance(found, dict)
    assert found["machine"] == "A CPU"
    graphs = found["graphs"]
    assert isinstance(graphs, list)
    assert len(graphs) == 4
    assert graphs[2] == MEASURED.graphs[2]._asdict()


def test_without_latency_nothing_is_said_of_it(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert not any("latency" in line for line in bundle_text(opened))
    assert bundle_json(opened)["latency"] is None

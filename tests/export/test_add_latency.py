"""Graphs of a bundle are timed kind by kind, variants in turns, and never for much longer than a minute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

import te_export
from te_export.add_latency import AddedLatency, measure_latency, staged_opener
from te_export.models.input_rows import InputRows
from te_runtime.manifest import GraphLatency, GraphSpec, Precision, TaskGraphs, TensorSpec, Variant

ROWS = InputRows({"x": np.zeros((5, 3), np.float32)})
SPEEDS_US: Mapping[str, float] = {"fp32": 200.0, "int8": 50.0, "int4": 300.0}


def graph(path: str) -> GraphSpec:
    return GraphSpec(
        path, (TensorSpec("x", "float32", ("batch", 3)),), (TensorSpec("y", "float32", ("batch", 1)),)
    )


def variant(precision: Precision, tasks: Sequence[str]) -> Variant:
    return Variant(
        precision=precision,
        form="float32",
        optimized="exact",
        target_provider="cpu",
        weights=f"{precision}/weights.bin",
        joint=graph(f"{precision}/joint.onnx"),
        trunk=None,
        joint_tails=None,
        tasks=tuple(
            TaskGraphs(
                task,
                graph(f"{precision}/task-{task}.onnx"),
                graph(f"{precision}/tail-{task}.onnx"),
                None,
                None,
            )
            for task in tasks
        ),
        kept_weights=(),
        accuracy=(),
        parity=(),
    )


@dataclass
class Machine:
    """Opens graphs that take the time of their variant, on a clock that stands still otherwise.

    Attributes:
        slower: how many times longer every graph takes.
        opening_us: what opening a graph takes.
    """

    slower: float = 1.0
    opening_us: float = 0.0
    now_ns: int = 0
    opened: list[str] = field(default_factory=list)

    def clock(self) -> int:
        return self.now_ns

    def open(self, spec: GraphSpec) -> Timed:
        self.opened.append(spec.path)
        self.now_ns += round(1e3 * self.opening_us)
        return Timed(self, spec)


@dataclass
class Timed:
    """One opened graph."""

    machine: Machine
    spec: GraphSpec

    def run(self, feeds: Mapping[str, NDArray[np.generic]]) -> Sequence[NDArray[np.generic]]:
        precision = self.spec.path.split("/")[0]
        self.machine.now_ns += round(1e3 * SPEEDS_US[precision] * self.machine.slower)
        return [np.zeros((len(feeds["x"]), 1))]


def measured(machine: Machine, precisions: Sequence[Precision], tasks: Sequence[str]) -> AddedLatency:
    variants = [variant(precision, tasks) for precision in precisions]
    return measure_latency(variants, ROWS, machine.open, clock_ns=machine.clock)


def test_each_kind_is_held_against_fp32s_graph_of_that_kind() -> None:
    machine = Machine()

    found = measured(machine, ("fp32", "int8", "int4"), ("a", "b"))

    kinds = ("joint", "task-a", "task-b")
    assert machine.opened == [
        f"{precision}/{kind}.onnx" for kind in kinds for precision in ("fp32", "int8", "int4")
    ]
    assert found.latency.graphs == tuple(
        GraphLatency(f"{precision}/{kind}.onnx", batch, speed, speed, speed, rounds=500, ratio=speed / 200)
        for kind in kinds
        for batch in (1, 8, 64)
        for precision, speed in SPEEDS_US.items()
    )
    assert (found.untimed, found.notes) == ((), ())
    assert found.detail == "9 graphs over 1, 8, 64 rows, one thread"


def test_it_is_told_on_what_it_was_measured() -> None:
    latency = measured(Machine(), ("fp32",), ("a",)).latency

    assert latency.machine.isprintable()
    assert 0 < len(latency.machine) <= 200
    assert (latency.provider, latency.threads) == ("cpu", 1)
    assert latency.onnxruntime


@pytest.mark.parametrize("tasks", [1, 5, 60, 2000])
def test_many_tasks_share_a_minute(tasks: int) -> None:
    machine = Machine(slower=50)

    found = measured(machine, ("fp32", "int8"), [f"t{place}" for place in range(tasks)])

    assert machine.now_ns <= 61e9
    timed = {entry.path for entry in found.latency.graphs}
    assert {"fp32/joint.onnx", "int8/joint.onnx"} <= timed
    assert len(timed) == 2 * (1 + tasks - len(found.untimed))
    assert bool(found.untimed) == (tasks == 2000)


def test_tasks_that_no_time_is_left_for_are_told_of() -> None:
    machine = Machine(opening_us=8e6)

    found = measured(machine, ("fp32", "int8"), ("a", "b", "c", "d", "e"))

    assert found.untimed == ("d", "e")
    (note,) = found.notes
    assert "2 tasks are not timed: d and what follows" in note
    assert found.detail.endswith("; no time was left for 2 tasks")
    assert {entry.path for entry in found.latency.graphs if "task-" in entry.path} == {
        f"{precision}/task-{task}.onnx" for precision in ("fp32", "int8") for task in ("a", "b", "c")
    }


def test_a_graph_that_takes_minutes_is_timed_once() -> None:
    found = measured(Machine(slower=1e6), ("fp32", "int8"), ("a",))

    assert {entry.rounds for entry in found.latency.graphs} == {1}
    assert found.untimed == ("a",)


def test_the_graphs_of_a_bundle(exported: te_export.ExportResult) -> None:
    manifest = exported.manifest
    rows = InputRows({spec.name: np.zeros((4, *spec.shape[1:]), np.float32) for spec in manifest.inputs})

    found = measure_latency(manifest.variants, rows, staged_opener(exported.bundle))

    (variant,) = manifest.variants
    assert {entry.path for entry in found.latency.graphs} == {
        variant.joint.path,
        *(graphs.graph.path for graphs in variant.tasks),
    }
    assert all(0 < entry.p10_us <= entry.p50_us <= entry.p90_us for entry in found.latency.graphs)
    assert {entry.ratio for entry in found.latency.graphs} == {1.0}
    manifest._replace(latency=found.latency).check()

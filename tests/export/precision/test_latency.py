"""Sessions are timed in turns, on a clock that the fakes turn; nothing here depends on how fast this machine is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import te_export
from te_export.models.input_rows import InputRows
from te_export.precision.latency import BATCH_SIZES, LatencyRatio, latency_feeds, measure_ratios
from te_runtime.manifest import GraphSpec, TensorSpec
from te_runtime.session import open_session

SPEC = GraphSpec(
    "g.onnx", (TensorSpec("x", "float32", ("batch", 3)),), (TensorSpec("y", "float32", ("batch",)),)
)


class Clock:
    """Stands still until a session works."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


class FakeSession:
    """Takes the given microseconds, over and over, and notes every call."""

    def __init__(self, name: str, calls: list[tuple[str, int]], clock: Clock, *latencies_us: float) -> None:
        self.spec = SPEC
        self._name, self._calls, self._clock = name, calls, clock
        self._latencies_us = latencies_us
        self._count = 0

    def run(self, feeds: Mapping[str, NDArray[np.generic]]) -> Sequence[NDArray[np.generic]]:
        self._calls.append((self._name, len(feeds["x"])))
        self._clock.now_ns += round(1e3 * self._latencies_us[self._count % len(self._latencies_us)])
        self._count += 1
        return [np.zeros(1)]


FEEDS = latency_feeds(["x"], InputRows({"x": np.zeros((5, 3), np.float32)}))


def measured(
    latencies_us: Mapping[str, Sequence[float]], **options: float
) -> tuple[tuple[LatencyRatio, ...], list[tuple[str, int]]]:
    calls: list[tuple[str, int]] = []
    clock = Clock()
    sessions = {name: FakeSession(name, calls, clock, *times) for name, times in latencies_us.items()}
    return measure_ratios(sessions, FEEDS, clock_ns=clock, **options), calls


def test_ratios_are_to_the_first_session() -> None:
    found, _ = measured({"fp32": [200], "static": [50], "dynamic": [300]})
    assert [(entry.name, entry.batch) for entry in found] == [
        (name, batch) for batch in BATCH_SIZES for name in ("fp32", "static", "dynamic")
    ]
    for entry in found:
        expected = {"fp32": 1.0, "static": 0.25, "dynamic": 1.5}[entry.name]
        assert (entry.low, entry.ratio, entry.high) == (expected, expected, expected)
        assert entry.latency_us == expected * 200


def test_sessions_take_turns_and_each_goes_first_as_often() -> None:
    found, calls = measured({"a": [100], "b": [100], "c": [100]}, seconds=0.0019)
    ones = [name for name, batch in calls if batch == 1]
    assert found[0].rounds == 3
    assert "".join(ones) == "aabbccbbccaaccaabb"
    assert [batch for _, batch in calls] == [1] * 18 + [8] * 18 + [64] * 18


def test_a_session_beside_itself_is_as_fast() -> None:
    calls: list[tuple[str, int]] = []
    clock = Clock()
    one = FakeSession("one", calls, clock, 70)
    found = measure_ratios({"one": one, "again": one}, FEEDS, clock_ns=clock)
    assert {(entry.low, entry.ratio, entry.high) for entry in found} == {(1.0, 1.0, 1.0)}


def test_what_slows_the_machine_slows_every_session() -> None:
    busy = [100, 100] * 5 + [300, 300] * 2  # warm and timed call of each round
    found, _ = measured({"a": busy, "b": [2 * latency for latency in busy]}, seconds=0.05)
    assert {(entry.low, entry.ratio, entry.high) for entry in found if entry.name == "b"} == {(2.0, 2.0, 2.0)}


def test_outliers_show_in_the_spread_alone() -> None:
    found, _ = measured({"a": [100], "b": [100, 100, 100, 100, 100, 900]}, seconds=1.0)
    entry = found[1]
    assert entry.ratio == 1.0
    assert entry.low == 1.0
    assert entry.high == 9.0
    assert (entry.latency_low_us, entry.latency_us, entry.latency_high_us) == (100.0, 100.0, 900.0)


@pytest.mark.parametrize(("latency_us", "rounds"), [(1, 500), (1e5, 5), (2.4e5, 2), (9e5, 1), (1e8, 1)])
def test_slow_graphs_get_fewer_rounds(latency_us: float, rounds: int) -> None:
    found, calls = measured({"a": [latency_us], "b": [latency_us]})
    assert {entry.rounds for entry in found} == {rounds}
    assert len(calls) == 3 * 4 * rounds


def test_a_clock_that_does_not_move_gives_ratios_of_one() -> None:
    found, _ = measured({"a": [0], "b": [0]})
    assert {entry.ratio for entry in found} == {1.0}


def test_there_must_be_a_session() -> None:
    with pytest.raises(ValueError, match="no sessions"):
        measure_ratios({}, FEEDS)


@pytest.mark.parametrize("rows", [1, 16, 64, 100])
def test_feeds_repeat_rows_where_they_are_too_few(rows: int) -> None:
    x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    feeds = latency_feeds(["x"], InputRows({"x": x}))
    assert tuple(feeds) == BATCH_SIZES
    for batch, feed in feeds.items():
        np.testing.assert_array_equal(feed["x"], np.concatenate([x] * 64)[:batch])
        assert feed["x"].flags.c_contiguous


def test_real_sessions(exported: te_export.ExportResult) -> None:
    root, (variant,) = exported.bundle, exported.manifest.variants
    one_task = variant.tasks[0].graph
    sessions = {
        name: open_session(Path(root) / spec.path, spec, provider="cpu", threads=1)
        for name, spec in (("joint", variant.joint), ("one task", one_task))
    }
    feeds = latency_feeds(["x"], InputRows({"x": np.zeros((16, 20), np.float32)}))
    found = measure_ratios(sessions, feeds, seconds=0.05)
    assert [(entry.name, entry.batch) for entry in found][:2] == [("joint", 1), ("one task", 1)]
    assert all(0 < entry.low <= entry.ratio <= entry.high and entry.latency_us > 0 for entry in found)

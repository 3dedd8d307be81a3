"""What reports say of latency."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from te_export.report.latency_figures import LATENCY_HEADINGS, Timed, latency_row, measured_on, microseconds
from te_runtime.manifest import GraphLatency, Latency

FIGURES = GraphLatency("int8/joint.onnx", 64, 1_250.0, 999.4, 20_000.0, 1_234, 0.4567)


def test_a_row() -> None:
    row = latency_row(Timed(None, "int8", FIGURES))
    assert dict(zip(LATENCY_HEADINGS, row, strict=True)) == {
        "graph": "all tasks",
        "variant": "int8",
        "rows per call": "64",
        "median": "1.25 ms",
        "over fp32": "0.46x",
        "10% to 90%": "999 µs to 20.0 ms",
        "rounds": "1,234",
    }
    assert latency_row(Timed("click", "int8", FIGURES))[0] == "click"


@pytest.mark.parametrize(("threads", "told"), [(1, "one thread"), (4, "4 threads")])
def test_where_it_was_measured(threads: int, told: str) -> None:
    assert measured_on(Latency("A CPU", "1.31.1", "cpu", threads, (FIGURES,))) == (
        f"A CPU, onnxruntime 1.31.1 on cpu, {told}"
    )


@pytest.mark.parametrize(
    ("latency_us", "text"),
    [
        (0.001, "0.00 µs"),
        (4.206, "4.21 µs"),
        (9.994, "9.99 µs"),
        (9.996, "10.0 µs"),
        (99.96, "100 µs"),
        (121.4, "121 µs"),
        (999.4, "999 µs"),
        (999.7, "1.00 ms"),
        (1_300, "1.30 ms"),
        (999_600, "1.00 s"),
        (12_000_000, "12.0 s"),
        (1e12, "1,000,000 s"),
    ],
)
def test_times_have_three_figures(latency_us: float, text: str) -> None:
    assert microseconds(latency_us) == text


@given(st.floats(min_value=0.1, max_value=1e9))
def test_a_time_is_told_within_half_a_percent_or_a_hundredth(latency_us: float) -> None:
    amount, unit = microseconds(latency_us).split(" ")
    size = {"µs": 1.0, "ms": 1e3, "s": 1e6}[unit]
    assert float(amount.replace(",", "")) * size == pytest.approx(latency_us, rel=0.005, abs=0.0051)

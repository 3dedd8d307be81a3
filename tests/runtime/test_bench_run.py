"""Whole benchmarks of models that take as long as the test says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from te_runtime.bench_environment import Environment
from te_runtime.bench_json import MAX_SAMPLES, bench_json
from te_runtime.bench_options import BenchOptions, Other, parse_bench_options
from te_runtime.bench_rows import BenchRows
from te_runtime.bench_run import BenchReport, measure
from te_runtime.bench_text import bench_text
from te_runtime.cpu import Cpu
from te_runtime.errors import InputError

MS = 1_000_000
ENVIRONMENT = Environment(
    Cpu("Test CPU", "x86_64", {}, 2, 4), "Test-1", "3.11.0", "0.1.0", "1.31.1", {"onnxruntime": "1.31.1"}, 0.5
)


def asked(**changes: Any) -> BenchOptions:
    chosen: dict[str, Any] = {
        "scenarios": (),
        "batches": "1,8",
        "duration_s": 0.1,
        "tasks": (),
        "p99_ms": None,
        "seed": 0,
        "compare": Other(),
    }
    return parse_bench_options(**{**chosen, **changes})


def report(fakes: ModuleType, options: BenchOptions, *times: Any) -> BenchReport:
    """A benchmark of one fake bundle for every entry of times."""
    clock, shown = fakes.FakeClock(), fakes.Shown()
    each = times or (lambda rows: repeat(rows * MS),)
    subjects = tuple(
        fakes.subject(clock, name=f"bundle-{number}", times=entry) for number, entry in enumerate(each)
    )
    results, is_interrupted = measure(subjects, options, clock=clock, progress=shown)
    rows = BenchRows((), {"x": np.zeros((8, 2))}, "ordinary", 8, ("click", "buy"))
    return BenchReport(options, ENVIRONMENT, 90 * MS, rows, subjects, results, is_interrupted)


def told(found: BenchReport) -> str:
    lines = list(bench_text(found))
    assert max(map(len, lines)) <= 80
    return "\n".join(lines)


def as_json(found: BenchReport) -> Any:
    return json.loads(json.dumps(bench_json(found), allow_nan=False))


def test_by_itself_it_measures_single_stream_and_offline(bench_fakes: ModuleType) -> None:
    found = report(bench_fakes, asked())
    assert [(result.scenario, result.rows_per_call) for result in found.results] == [
        ("single-stream", 1),
        ("offline", 1),
        ("offline", 8),
    ]
    text = told(found)
    for part in (
        "bundle-0, fp32 on cpu",
        "mode         joint, 1 graph; asked for",
        "threads      1",
        "loaded in 100 ms, first prediction in 3.00 ms",
        "20.0 MB for the model, in main memory (PSS 30.0 MB before",
        "Test CPU, x86_64, 2 of 4 CPUs usable; load average before: 0.5",
        "onnxruntime 1.31.1 (imported in 90.0 ms)",
        "the 8 ordinary golden rows, over and over; tasks click, buy",
        "  latency    ms: p50 1.00, p90 1.00, p99 1.00, p99.9 —; 100 calls",
        "  parts      steady: the medians of 5 parts are 1.00 to 1.00 ms, 0.0% apart",
        "  CPU        0.50 CPU s per s, 500 CPU µs per row; 1,000 rows/s",
        "  warm-up    20 calls, settled",
        "      8      1,000     8.00     8.00     8.00      13    0.50     500  0.0%",
        "Too few calls to tell whether they are steady: offline 8.",
    ):
        assert part in text
    assert "NOISY" not in text


def test_as_json(bench_fakes: ModuleType) -> None:
    found = as_json(report(bench_fakes, asked(scenarios=("multi-stream",))))
    assert (found["interrupted"], found["settings"]["duration_s"]) == (False, 0.1)
    assert found["environment"]["onnxruntime"] == "1.31.1"
    (bundle,) = found["bundles"]
    assert (bundle["load_ms"], bundle["first_prediction_ms"]) == (100, 3)
    assert (bundle["model_pss_bytes"], bundle["threads"], bundle["provider"]) == (20_000_000, 1, "cpu")
    (result,) = found["results"]
    assert (result["scenario"], result["rows_per_call"]) == ("multi-stream", 8)
    (measured,) = result["bundles"]
    assert measured["samples_ns"] == [8 * MS] * 13
    assert (measured["samples_every"], measured["latency_ms"]["p99.9"]) == (1, None)
    assert (measured["cpu_s_per_s"], measured["cpu_us_per_row"]) == (0.5, 500)
    assert measured["rows_per_s"] == pytest.approx(1000)


def test_raw_samples_are_thinned_evenly(bench_fakes: ModuleType) -> None:
    found = as_json(report(bench_fakes, asked(scenarios=("single-stream",), duration_s=MAX_SAMPLES / 400)))
    (measured,) = found["results"][0]["bundles"]
    assert (measured["calls"], measured["samples_every"]) == (25_000, 3)
    assert len(measured["samples_ns"]) == 8_334 <= found["rules"]["samples_at_most"]
    assert measured["latency_ms"]["p99.9"] == 1


def test_a_noisy_run_is_called_noisy(bench_fakes: ModuleType) -> None:
    found = report(
        bench_fakes,
        asked(scenarios=("single-stream",)),
        lambda rows: chain(repeat(MS, 50), repeat(2 * MS)),
    )
    text = told(found)
    assert "  parts      NOISY: the medians of 5 parts are 1.00 to 2.00 ms, 50.0% apart" in text
    assert "NOISY: single-stream: parts of the run differ by more than 5%, or" in text
    assert as_json(found)["results"][0]["bundles"][0]["parts"]["state"] == "noisy"


def test_p999_of_few_samples_is_doubted(bench_fakes: ModuleType) -> None:
    text = told(report(bench_fakes, asked(scenarios=("single-stream",), duration_s=2.0)))
    assert "p99.9 1.00; 2,000 calls" in text
    assert "p99.9 is hardly known: 2 of 2,000 calls lie beyond it" in text


def test_two_bundles_take_turns(bench_fakes: ModuleType) -> None:
    found = report(
        bench_fakes,
        asked(scenarios=("single-stream", "offline"), batches="8", compare=Other(Path("b")), duration_s=1.5),
        lambda rows: repeat(rows * MS),
        lambda rows: repeat(rows * 2 * MS),
    )
    text = told(found)
    for part in (
        "A: bundle-0, fp32 on cpu",
        "B: bundle-1, fp32 on cpu",
        "  A over B   0.500, 95 % sure of 0.500 to 0.500: A is faster",
        "10 % to 90 % of 250 pairs of calls: 0.500 to 0.500",
        "steady: the ratios of 10 parts are 0.500 to 0.500, 0.0% apart",
        "  A latency  ms: p50 1.00",
        "  B latency  ms: p50 2.00",
        "  A     8      1,000     8.00",
        "  B     8        500     16.0",
        "Steady: the parts of every measurement lie within 5%.",
    ):
        assert part in text
    ratio = as_json(found)["results"][0]["ratio"]
    assert (ratio["median"], ratio["state"], ratio["pairs"]) == (0.5, "steady", 250)
    assert len(as_json(found)["results"][0]["bundles"]) == 2


def test_ratios_that_drift_say_so(bench_fakes: ModuleType) -> None:
    drifting = report(
        bench_fakes,
        asked(scenarios=("single-stream",), compare=Other(Path("b")), duration_s=0.4),
        lambda rows: repeat(MS),
        lambda rows: chain(repeat(MS, 20 + 100), repeat(MS * 11 // 10)),
    )
    text = told(drifting)
    assert "NOISY: the ratios of 10 parts are 0.909 to 1.000, 10.0% apart" in text
    assert "neither is shown to be faster" in text
    assert "NOISY: single-stream latency, single-stream ratio: " in text


def test_a_steady_ratio_of_noisy_latencies_is_no_noise(bench_fakes: ModuleType) -> None:
    def times(_rows: int) -> Iterator[int]:
        return chain(repeat(MS, 20 + 100), repeat(2 * MS))

    options = asked(scenarios=("single-stream",), compare=Other(Path("b")), duration_s=1.0)
    text = told(report(bench_fakes, options, times, times))
    assert "steady: the ratios of 10 parts are 1.000 to 1.000, 0.0% apart" in text
    assert "NOISY: single-stream latency: " in text


def test_server_finds_a_rate(bench_fakes: ModuleType) -> None:
    options = asked(scenarios=("server",), p99_ms=20.0, duration_s=5.0)
    found = report(bench_fakes, options)
    rate = as_json(found)["results"][0]["server"]["rate_per_s"]
    assert 600 < rate < 1000  # M/D/1: at 1 ms a query, p99 of 20 ms holds to some 90 % of the capacity
    text = told(found)
    assert f"  rate       {rate:,.0f} queries/s, the highest that kept p99 within 20 ms" in text
    assert "within the bound" in text
    assert as_json(report(bench_fakes, options))["results"] == as_json(found)["results"]


def test_a_bound_below_one_query_alone_is_refused(bench_fakes: ModuleType) -> None:
    with pytest.raises(
        InputError, match=r"cannot be held at any rate: one query at a time takes 1 ms at p99"
    ):
        report(bench_fakes, asked(scenarios=("server",), p99_ms=0.5))


def test_one_hiccup_does_not_refuse_a_bound(bench_fakes: ModuleType) -> None:
    def slow_once(_rows: int) -> Iterator[int]:
        return chain(repeat(MS, 20 + 40), [9 * MS], repeat(MS))

    found = report(bench_fakes, asked(scenarios=("server",), p99_ms=5.0, duration_s=0.09), slow_once)
    assert found.results[0].server is not None
    assert found.results[0].server.best is not None


def test_a_rate_of_few_queries_is_hardly_known(bench_fakes: ModuleType) -> None:
    few = report(bench_fakes, asked(scenarios=("server",), p99_ms=20.0, duration_s=0.3))
    queries = len(few.results[0].of[0].timed.latencies_ns)
    assert queries < 459
    assert f"hardly known: {queries} queries, and p99 needs 459, none of them over" in told(few)
    many = report(bench_fakes, asked(scenarios=("server",), p99_ms=20.0, duration_s=5.0))
    assert "hardly known: " not in told(many).replace("p99.9 is hardly known: ", "")


def test_random_arrivals_are_not_blamed_on_the_machine(bench_fakes: ModuleType) -> None:
    found = report(bench_fakes, asked(scenarios=("server",), p99_ms=20.0, duration_s=5.0))
    assert as_json(found)["results"][0]["bundles"][0]["parts"]["state"] == "noisy"
    assert "Quiet the machine" not in told(found)
    assert "Steady" not in told(found)


def test_p99_of_few_calls_is_the_slowest(bench_fakes: ModuleType) -> None:
    few, enough = (
        told(report(bench_fakes, asked(scenarios=("single-stream",), duration_s=s))) for s in (0.099, 0.1)
    )
    assert "99 calls\n             p99 is the slowest of so few calls" in few
    assert "p99 is the slowest" not in enough


def test_a_narrow_page_has_one_measurement_after_another(bench_fakes: ModuleType) -> None:
    found = report(bench_fakes, asked())
    lines = list(bench_text(found, 40))
    assert max(map(len, lines)) <= 40
    assert "offline: calls of 8 rows, one after" in lines
    assert not any("CPU s/s" in line for line in lines)


def test_a_bound_that_no_rate_holds_is_refused_with_the_rates(bench_fakes: ModuleType) -> None:
    def slow_once_warm(_rows: int) -> Iterator[int]:
        return chain(repeat(MS, 20 + 100), repeat(30 * MS))

    with pytest.raises(
        InputError, match=r"no rate held it for certain, from 500 queries a second down to 15\.6, "
    ):
        report(bench_fakes, asked(scenarios=("server",), p99_ms=5.0), slow_once_warm)


def test_an_interrupt_keeps_what_was_measured(bench_fakes: ModuleType) -> None:
    found = report(
        bench_fakes,
        asked(),
        lambda rows: repeat(MS) if rows == 1 else chain(repeat(MS, 40), repeat(-1)),
    )
    assert found.is_interrupted
    assert [len(result.of[0].timed.latencies_ns) for result in found.results] == [100, 100, 20]
    text = told(found)
    assert text.startswith("INTERRUPTED: this is what was measured until then.\n")
    assert "  interrupted\n" in text
    assert text.endswith("INTERRUPTED: some of what was asked for is missing.")
    assert (as_json(found)["status"], as_json(found)["interrupted"]) == ("interrupted", True)


@pytest.mark.parametrize("calls", [0, 20])
def test_an_interrupt_before_anything_was_timed(bench_fakes: ModuleType, calls: int) -> None:
    found = report(bench_fakes, asked(), lambda rows: chain(repeat(MS, calls), repeat(-1)))
    assert found.is_interrupted
    assert found.results == ()
    assert "Nothing was measured." in told(found)
    assert as_json(found)["results"] == []


@pytest.mark.parametrize("calls", [20 + 50, 20 + 100 + 60])
def test_an_interrupted_search_tells_what_held(bench_fakes: ModuleType, calls: int) -> None:
    found = report(
        bench_fakes,
        asked(scenarios=("server",), p99_ms=50.0),
        lambda rows: chain(repeat(MS, calls), repeat(-1)),
    )
    text = told(found)
    assert "rate       not found before the interrupt" in text
    assert ("once" in text) == (calls > 100)
    assert as_json(found)["results"][0]["server"]["rate_per_s"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"duration_s": float("nan")}, "--duration: found nan, expected more than 0"),
        ({"duration_s": 0.0}, "--duration: found 0"),
        ({"duration_s": -1.0}, "--duration: found -1"),
        ({"duration_s": float("inf")}, "at most 600 seconds"),
        ({"scenarios": ("sever",)}, "--scenario: found 'sever', expected 'single-stream', "),
        ({"scenarios": ("server",)}, "scenario server needs --p99-ms MS"),
        ({"p99_ms": 5.0}, "add --scenario server, or leave it out"),
        ({"scenarios": ("server",), "p99_ms": 0.0}, "--p99-ms: found 0"),
        ({"scenarios": ("server",), "p99_ms": float("nan")}, "--p99-ms: found nan"),
        ({"scenarios": ("server",), "p99_ms": 5.0, "compare": Other(Path("b"))}, "leave one of them out"),
        ({"batches": ""}, "--batch: found ''"),
        ({"batches": "1,0"}, "--batch: found '0'"),
        ({"batches": "1,x"}, "from 1 to 65536 with commas between, such as 1,8,64"),
        ({"batches": "65537"}, "--batch: found '65537'"),
        ({"batches": "8,8"}, "--batch: 8 is there twice"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        asked(**changes)
    assert message in str(raised.value)


def test_scenarios_named_twice_are_measured_once_in_their_order() -> None:
    assert asked(scenarios=("offline", "single-stream", "offline")).scenarios == ("single-stream", "offline")

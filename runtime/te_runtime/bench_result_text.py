"""The lines of `te-runtime bench` on one measurement, and the table of scenario offline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from te_runtime.bench_page import WIDTH, Page, counted, shown_ms
from te_runtime.bench_ratio import PairRatio
from te_runtime.bench_run import Measured, Result
from te_runtime.bench_samples import NOISY_ABOVE, Spread, SpreadState, spread_of_parts, summarize
from te_runtime.bench_scenarios import Timed
from te_runtime.bench_server import QUERIES_FOR_P99, Found, Trial

__all__ = ["offline_lines", "result_lines"]

P999_KNOWN_FROM = 10_000
_TITLES = {
    "single-stream": "one row after another",
    "multi-stream": "queries of {rows} rows, one after another",
    "offline": "calls of {rows} rows, one after another",
    "server": "rows arrive at random; latency counts from arrival",
}


def result_lines(page: Page, result: Result, names: Sequence[str]) -> Iterator[str]:
    """A measurement with all that is known of it.

    Args:
        page: sets the lines.
        result: what was measured.
        names: what the lines call the bundles; one empty name where there is one.
    """
    title = _TITLES[result.scenario].format(rows=result.rows_per_call)
    interrupted = " (interrupted)" if result.is_interrupted else ""
    yield from page.sentence(f"{result.scenario}: {title}{interrupted}")
    if result.server is not None:
        yield from _server_lines(page, result.server)
    if result.ratio is not None:
        yield from _ratio_lines(page, result.ratio)
    for name, measured in zip(names, result.of, strict=False):  # none where a search was interrupted
        yield from _measured_lines(page, f"{name} " if name else "", measured, result.server)


def offline_lines(page: Page, results: Sequence[Result], names: Sequence[str]) -> Iterator[str]:
    """Scenario offline: a table, or where that has no room one measurement after another."""
    if page.width < WIDTH:
        for result in results:
            yield from result_lines(page, result, names)
        return
    yield "offline: calls of many rows, one after another"
    label = 2 if len(names) > 1 else 0
    yield (
        f"  {'':{label}}{'rows':>5} {'rows/s':>10} {'p50 ms':>8} {'p90 ms':>8} {'p99 ms':>8} "
        f"{'calls':>7} {'CPU s/s':>7} {'µs/row':>7}  parts"
    )
    for result in results:
        for name, measured in zip(names, result.of, strict=True):
            yield f"  {name:{label}}{_offline_row(result, measured)}"
        if result.is_interrupted:
            yield "  interrupted"
        if result.ratio is not None:
            yield from _ratio_lines(page, result.ratio)


def _offline_row(result: Result, measured: Measured) -> str:
    timed = measured.timed
    latency, spread = summarize(timed.latencies_ns), spread_of_parts(timed.latencies_ns)
    return (
        f"{result.rows_per_call:>5} {timed.rows_per_s:>10,.0f} {shown_ms(latency.p50_ns):>8} "
        f"{shown_ms(latency.p90_ns):>8} {shown_ms(latency.p99_ns):>8} {latency.count:>7} "
        f"{timed.cpu_ns / max(1, timed.wall_ns):>7.2f} {_cpu_us_per_row(timed):>7}  {spread.apart:.1%}"
    )


def _cpu_us_per_row(timed: Timed) -> str:
    time_us = timed.cpu_ns / 1e3 / timed.rows
    return f"{time_us:,.0f}" if time_us >= 10 else f"{time_us:.2g}"


def _server_lines(page: Page, found: Found) -> Iterator[str]:
    best, held = found.best, [trial for trial in found.trials if trial.holds]
    if best is None:
        rate = "not found before the interrupt"
        if held:
            highest = max(held, key=lambda trial: trial.rate_per_s)
            rate += f"; {_shown_rate(highest)} queries/s kept p99 within {highest.bound_ns / 1e6:g} ms once"
    else:
        rate = f"{_shown_rate(best)} queries/s, the highest that kept p99 within {best.bound_ns / 1e6:g} ms"
    yield from page.field("  rate", rate)
    if best is not None:
        queries = len(best.timed.latencies_ns)
        if queries < QUERIES_FOR_P99:
            yield from page.field(
                "",
                f"hardly known: {counted(queries, 'query', 'queries')}, and p99 needs {QUERIES_FOR_P99}, none of them "
                "over the bound, to be 99 % sure",
            )
    yield from page.field(
        "  search", f"{counted(len(found.trials), 'run')}, {len(held)} of them within the bound"
    )


def _shown_rate(trial: Trial) -> str:
    rate = trial.rate_per_s
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _measured_lines(page: Page, name: str, measured: Measured, server: Found | None) -> Iterator[str]:
    timed = measured.timed
    latency = summarize(timed.latencies_ns)
    tail = "—" if latency.p999_ns is None else f"{shown_ms(latency.p999_ns)}"
    yield from page.field(
        f"  {name}latency",
        f"ms: p50 {shown_ms(latency.p50_ns)}, p90 {shown_ms(latency.p90_ns)}, p99 {shown_ms(latency.p99_ns)}, "
        f"p99.9 {tail}; {counted(latency.count, 'call')}",
    )
    if latency.count < 100:
        yield from page.field("", "p99 is the slowest of so few calls")
    if latency.p999_ns is not None and latency.count < P999_KNOWN_FROM:
        slower = latency.count // 1000
        yield from page.field("", f"p99.9 is hardly known: {slower} of {latency.count:,} calls lie beyond it")
    yield from page.field(f"  {name}parts", _spread_text(spread_of_parts(timed.latencies_ns)))
    cpu = f"{_cpu_us_per_row(timed)} CPU µs per row"
    if server is None:
        cpu = f"{timed.cpu_ns / max(1, timed.wall_ns):.2f} CPU s per s, {cpu}; {timed.rows_per_s:,.0f} rows/s"
    yield from page.field(f"  {name}CPU", cpu)
    settled = "settled" if measured.warm_up.settled else "not settled"
    yield from page.field(f"  {name}warm-up", f"{counted(measured.warm_up.calls, 'call')}, {settled}")


def _spread_text(spread: Spread) -> str:
    low, high = min(spread.medians_ns), max(spread.medians_ns)
    return (
        f"{_shown_state(spread.state)}: the medians of {counted(len(spread.medians_ns), 'part')} are {shown_ms(low)} "
        f"to {shown_ms(high)} ms, {spread.apart:.1%} apart"
    )


def _ratio_lines(page: Page, ratio: PairRatio) -> Iterator[str]:
    faster = "neither is shown to be faster"
    if ratio.is_told_from_one:
        faster = "A is faster" if ratio.median < 1 else "B is faster"
    yield from page.field(
        "  A over B",
        f"{ratio.median:.3f}, 95 % sure of {ratio.sure_low:.3f} to {ratio.sure_high:.3f}: {faster}",
    )
    yield from page.field(
        "", f"10 % to 90 % of {counted(ratio.pairs, 'pair')} of calls: {ratio.low:.3f} to {ratio.high:.3f}"
    )
    yield from page.field("", f"{_shown_state(ratio.state)}: {_doubt(ratio)}")


def _doubt(ratio: PairRatio) -> str:
    parts = (
        f"the ratios of {counted(len(ratio.parts), 'part')} are {min(ratio.parts):.3f} to {max(ratio.parts):.3f}, "
        f"{ratio.parts_apart:.1%} apart"
    )
    if ratio.sure_within <= NOISY_ABOVE:
        return parts
    return f"{parts}, and the ratio is known within {ratio.sure_within:.0%} only"


def _shown_state(state: SpreadState) -> str:
    return {"steady": "steady", "noisy": "NOISY", "too few": "too few calls to tell"}[state]

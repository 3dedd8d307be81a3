"""What `te-runtime bench` prints for people, 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from te_runtime.bench_run import BenchReport, Measured, Result
from te_runtime.bench_samples import NOISY_ABOVE, PairRatio, Spread, SpreadState, spread_of_parts, summarize
from te_runtime.bench_subject import Subject
from te_runtime.describe import shown_bytes
from te_runtime.provider_text import choice_lines, shown_provider

__all__ = ["bench_text"]

WIDTH = 80
P999_KNOWN_FROM = 10_000
_TITLES = {
    "single-stream": "one row after another",
    "multi-stream": "queries of {rows} rows, one after another",
    "offline": "{rows} rows a call, one call after another",
    "server": "rows arrive at random; latency counts from arrival",
}


def bench_text(report: BenchReport) -> Iterator[str]:
    """The lines of `te-runtime bench`."""
    if report.is_interrupted:
        yield "INTERRUPTED: this is what was measured until then."
    names = _names(report)
    for name, subject in zip(names, report.subjects, strict=True):
        yield from _subject_lines(name, subject)
    yield from _environment_lines(report)
    table = [result for result in report.results if result.scenario == "offline"]
    for result in report.results:
        if result.scenario != "offline":
            yield ""
            yield from _result_lines(result, names, report)
    if table:
        yield ""
        yield from _offline_lines(table, names)
    yield ""
    yield from _verdict_lines(report)


def _names(report: BenchReport) -> tuple[str, ...]:
    """What the lines call the bundles: nothing where there is one."""
    return ("",) if len(report.subjects) == 1 else ("A", "B")


def _field(label: str, text: str) -> Iterator[str]:
    yield from textwrap.wrap(
        text, WIDTH, initial_indent=f"{label:12} ", subsequent_indent=" " * 13, break_on_hyphens=False
    )


def _subject_lines(name: str, subject: Subject) -> Iterator[str]:
    title = f"{subject.path}, {subject.precision} on {shown_provider(subject.choice)}"
    yield f"{name}: {title}" if name else title
    for line in choice_lines(subject.choice):
        yield from _field("provider", line)
    graphs = _count(len(subject.plan.graphs), "graph")
    yield from _field("mode", f"{subject.plan.mode}, {graphs}; {subject.plan.reason}")
    yield from _field("threads", f"{subject.threads}")
    yield from _field(
        "cold start", f"loaded in {_ms(subject.load_ns)} ms, first prediction in {_ms(subject.first_ns)} ms"
    )
    before, ready = subject.pss_before_bytes, subject.pss_ready_bytes
    if before is None or ready is None:
        yield from _field("memory", "not measured: only Linux tells a process's own share (PSS)")
    else:
        more = max(0, ready - before)
        yield from _field(
            "memory",
            f"{shown_bytes(more)} for the model, in main memory (PSS {shown_bytes(before)} before loading, "
            f"{shown_bytes(ready)} after the first prediction)",
        )


def _environment_lines(report: BenchReport) -> Iterator[str]:
    found = report.environment
    busy = "" if found.load_average is None else f"; load average before: {found.load_average:.1f}"
    yield from _field(
        "machine",
        f"{found.cpu.model}, {found.cpu.architecture}, {found.cpu.usable} of {found.cpu.total} CPUs usable{busy}",
    )
    yield from _field(
        "software",
        f"onnxruntime {found.onnxruntime} (imported in {_ms(report.import_ns)} ms), te_runtime "
        f"{found.te_runtime or 'not installed as a package'}, Python {found.python}, {found.system}",
    )
    tasks = ", ".join(report.rows.tasks)
    yield from _field(
        "rows",
        f"the {report.rows.count} {report.rows.group} golden rows, over and over; "
        f"tasks {textwrap.shorten(tasks, 200, placeholder=' …')}",
    )
    seconds = report.options.duration_ns / 1e9
    yield from _field("duration", f"{seconds:g} s for each measurement, after its warm-up")


def _result_lines(result: Result, names: tuple[str, ...], report: BenchReport) -> Iterator[str]:
    title = _TITLES[result.scenario].format(rows=result.rows_per_call)
    yield f"{result.scenario}: {title}{_interrupted(result)}"
    if result.server is not None:
        yield from _server_lines(result, report)
    if result.ratio is not None:
        yield from _ratio_lines(result.ratio)
    for name, measured in zip(names, result.of, strict=False):  # none where a search was interrupted
        yield from _measured_lines(f"{name} " if name else "", measured, is_open_loop=bool(result.server))


def _interrupted(result: Result) -> str:
    return " (interrupted)" if result.is_interrupted else ""


def _server_lines(result: Result, report: BenchReport) -> Iterator[str]:
    found, bound = result.server, (report.options.p99_ns or 0) / 1e6
    if found is None:
        return
    if found.best is None:
        held_rates = [trial.rate_per_s for trial in found.trials if trial.holds]
        rate = "not found before the interrupt"
        if held_rates:
            rate += f"; {max(held_rates):,.0f} queries/s kept p99 within {bound:g} ms once"
    else:
        rate = f"{found.best.rate_per_s:,.0f} queries/s, the highest that kept p99 within {bound:g} ms"
    yield from _field("  rate", rate)
    held = sum(trial.holds for trial in found.trials)
    yield from _field("  search", f"{_count(len(found.trials), 'run')}, {held} of them within the bound")


def _measured_lines(name: str, measured: Measured, *, is_open_loop: bool) -> Iterator[str]:
    timed = measured.timed
    latency = summarize(timed.latencies_ns)
    tail = "—" if latency.p999_ns is None else f"{_ms(latency.p999_ns)}"
    yield from _field(
        f"  {name}latency",
        f"ms: p50 {_ms(latency.p50_ns)}, p90 {_ms(latency.p90_ns)}, p99 {_ms(latency.p99_ns)}, p99.9 {tail}; "
        f"{latency.count:,} calls",
    )
    if latency.p999_ns is not None and latency.count < P999_KNOWN_FROM:
        slower = latency.count // 1000
        yield from _field("", f"p99.9 is hardly known: {slower} of {latency.count:,} calls took longer")
    yield from _field(f"  {name}parts", _spread_text(spread_of_parts(timed.latencies_ns)))
    cpu = f"{timed.cpu_ns / 1e3 / timed.rows:,.0f} CPU µs per row"
    if not is_open_loop:
        cpu = f"{timed.cpu_ns / max(1, timed.wall_ns):.2f} CPU s per s, {cpu}; {timed.rows_per_s:,.0f} rows/s"
    yield from _field(f"  {name}CPU", cpu)
    yield from _field(f"  {name}warm-up", _warm_text(measured))


def _warm_text(measured: Measured) -> str:
    return f"{measured.warm_up.calls} calls, {'settled' if measured.warm_up.settled else 'not settled'}"


def _spread_text(spread: Spread) -> str:
    low, high = min(spread.medians_ns), max(spread.medians_ns)
    return (
        f"{_shown_state(spread.state)}: the medians of {len(spread.medians_ns)} parts are {_ms(low)} to {_ms(high)} "
        f"ms, {spread.apart:.1%} apart"
    )


def _ratio_lines(ratio: PairRatio) -> Iterator[str]:
    yield from _field(
        "  A over B",
        f"{ratio.median:.3f}, 95 % sure of {ratio.sure_low:.3f} to {ratio.sure_high:.3f}: {_faster(ratio)}",
    )
    yield from _field(
        "", f"10 % to 90 % of {ratio.pairs:,} pairs of calls: {ratio.low:.3f} to {ratio.high:.3f}"
    )
    yield from _field("", f"{_shown_state(ratio.state)}: {_doubt(ratio)}")


def _doubt(ratio: PairRatio) -> str:
    halves = f"ratios of the two halves differ by {ratio.halves_apart:.1%}"
    if ratio.sure_within <= NOISY_ABOVE:
        return halves
    return f"{halves}, and the ratio is known within {ratio.sure_within:.0%} only"


def _faster(ratio: PairRatio) -> str:
    """Which one is faster, unless chance or drift of the machine could have made it so."""
    is_within_chance = ratio.sure_low <= 1 <= ratio.sure_high
    if ratio.state == "too few" or is_within_chance or abs(ratio.median - 1) <= ratio.halves_apart:
        return "neither is shown to be faster"
    return "A is faster" if ratio.sure_high < 1 else "B is faster"


def _offline_lines(results: list[Result], names: tuple[str, ...]) -> Iterator[str]:
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
            yield from _ratio_lines(result.ratio)


def _offline_row(result: Result, measured: Measured) -> str:
    timed = measured.timed
    latency, spread = summarize(timed.latencies_ns), spread_of_parts(timed.latencies_ns)
    return (
        f"{result.rows_per_call:>5} {timed.rows_per_s:>10,.0f} {_ms(latency.p50_ns):>8} {_ms(latency.p90_ns):>8} "
        f"{_ms(latency.p99_ns):>8} {latency.count:>7} {timed.cpu_ns / max(1, timed.wall_ns):>7.2f} "
        f"{timed.cpu_ns / 1e3 / timed.rows:>7.0f}  {spread.apart:.1%}"
    )


def _verdict_lines(report: BenchReport) -> Iterator[str]:
    """Which figures are not to be trusted."""
    by_state: dict[SpreadState, list[str]] = {"noisy": [], "too few": []}
    for result in report.results:
        spreads = [spread_of_parts(measured.timed.latencies_ns).state for measured in result.of]
        states = [*spreads, *([] if result.ratio is None else [result.ratio.state])]
        name = f"offline {result.rows_per_call}" if result.scenario == "offline" else result.scenario
        for state, where in by_state.items():
            if state in states:
                where.append(name)
    if by_state["noisy"]:
        yield from _sentence(
            f"NOISY: {', '.join(by_state['noisy'])}: parts of the run differ by more than {NOISY_ABOVE:.0%}. "
            "Quiet the machine, or pass a longer --duration, before you rely on it."
        )
    if by_state["too few"]:
        yield from _sentence(
            f"Too few calls to tell whether they are steady: {', '.join(by_state['too few'])}. Pass a longer "
            "--duration."
        )
    if not any(result.of for result in report.results):
        yield "Nothing was measured."
    elif not any(by_state.values()):
        yield f"Steady: the parts of every measurement lie within {NOISY_ABOVE:.0%}."
    if report.is_interrupted:
        yield "INTERRUPTED: some of what was asked for is missing."


def _sentence(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, WIDTH, break_on_hyphens=False)


def _shown_state(state: SpreadState) -> str:
    return {"steady": "steady", "noisy": "NOISY", "too few": "too few calls to tell"}[state]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _ms(time_ns: float) -> str:
    """Milliseconds in three digits that count."""
    time_ms = time_ns / 1e6
    if time_ms >= 100:
        return f"{time_ms:,.0f}"
    return f"{time_ms:#.3g}" if time_ms >= 0.001 else f"{time_ms:.6f}"

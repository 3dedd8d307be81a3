"""What `te-runtime bench` prints for people: what was loaded, where, each measurement, and what is not to be trusted."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from te_runtime.bench_page import WIDTH, Page, shown_ms
from te_runtime.bench_result_text import offline_lines, result_lines
from te_runtime.bench_run import BenchReport, Result
from te_runtime.bench_samples import NOISY_ABOVE, SpreadState, spread_of_parts
from te_runtime.bench_subject_text import subject_lines

__all__ = ["bench_text"]


def bench_text(report: BenchReport, width: int = WIDTH) -> Iterator[str]:
    """The lines of `te-runtime bench`.

    Args:
        report: what was measured.
        width: columns, from 40; below 80 the table of scenario offline becomes one measurement after another.
    """
    page = Page(width)
    if report.is_interrupted:
        yield from page.sentence("INTERRUPTED: this is what was measured until then.")
    names = ("",) if report.options.compare is None else ("A", "B")
    for name, subject in zip(names, report.subjects, strict=False):  # fewer where loading was interrupted
        yield from subject_lines(page, name, subject, is_second=name == "B")
    yield from _environment_lines(page, report)
    table = [result for result in report.results if result.scenario == "offline"]
    for result in report.results:
        if result.scenario != "offline":
            yield ""
            yield from result_lines(page, result, names)
    if table:
        yield ""
        yield from offline_lines(page, table, names)
    yield ""
    yield from _verdict_lines(page, report)


def _environment_lines(page: Page, report: BenchReport) -> Iterator[str]:
    found = report.environment
    busy = "" if found.load_average is None else f"; load average before: {found.load_average:.1f}"
    yield from page.field(
        "machine",
        f"{found.cpu.model}, {found.cpu.architecture}, {found.cpu.usable} of {found.cpu.total} CPUs usable{busy}",
    )
    yield from page.field(
        "software",
        f"onnxruntime {found.onnxruntime} (imported in {shown_ms(report.import_ns)} ms), te_runtime "
        f"{found.te_runtime or 'not installed as a package'}, Python {found.python}, {found.system}",
    )
    tasks = ", ".join(report.rows.tasks)
    yield from page.field(
        "rows",
        f"the {report.rows.count} {report.rows.group} golden rows, over and over; "
        f"tasks {textwrap.shorten(tasks, 200, placeholder=' …')}",
    )
    seconds = report.options.duration_ns / 1e9
    yield from page.field("duration", f"{seconds:g} s for each measurement, after its warm-up")


def _verdict_lines(page: Page, report: BenchReport) -> Iterator[str]:
    """Which figures are not to be trusted. Scenario server is left out: random arrivals alone move its latencies."""
    closed_loop = [result for result in report.results if result.scenario != "server"]
    noisy, too_few = _in_state(closed_loop, "noisy"), _in_state(closed_loop, "too few")
    if noisy:
        yield from page.sentence(
            f"NOISY: {', '.join(noisy)}: parts of the run differ by more than {NOISY_ABOVE:.0%}, or the ratio is not "
            "known within that. Quiet the machine, or pass a longer --duration, before you rely on it."
        )
    if too_few:
        yield from page.sentence(
            f"Too few calls to tell whether they are steady: {', '.join(too_few)}. Pass a longer --duration."
        )
    if not any(result.of for result in report.results):
        yield "Nothing was measured."
    elif closed_loop and not noisy and not too_few:
        yield from page.sentence(f"Steady: the parts of every measurement lie within {NOISY_ABOVE:.0%}.")
    if report.is_interrupted:
        yield from page.sentence("INTERRUPTED: some of what was asked for is missing.")


def _in_state(results: list[Result], state: SpreadState) -> list[str]:
    """What is in a state: measurements, or of a comparison the latencies and the ratio by themselves."""
    found = []
    for result in results:
        name = f"offline {result.rows_per_call}" if result.scenario == "offline" else result.scenario
        if any(spread_of_parts(measured.timed.latencies_ns).state == state for measured in result.of):
            found.append(name if result.ratio is None else f"{name} latency")
        if result.ratio is not None and result.ratio.state == state:
            found.append(f"{name} ratio")
    return found

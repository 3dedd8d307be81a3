"""Runs a benchmark: opens the bundles, then one measurement after another, and keeps what an interrupt leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from te_runtime.bench_clock import Clock
from te_runtime.bench_compare import check_comparable, check_different, resolve_other
from te_runtime.bench_environment import Environment, read_environment
from te_runtime.bench_options import MULTI_STREAM_ROWS, BenchOptions, LoadOptions, Scenario
from te_runtime.bench_ratio import PairRatio, compare_pairs
from te_runtime.bench_rows import BenchRows, read_bench_rows
from te_runtime.bench_samples import summarize
from te_runtime.bench_scenarios import Tick, Timed, WarmUp, measure_calls, measure_pairs, warm_up
from te_runtime.bench_server import Found, Trial, find_rate, run_trial
from te_runtime.bench_subject import Subject, open_subject
from te_runtime.errors import InputError
from te_runtime.onnxruntime_install import import_onnxruntime

__all__ = ["BenchReport", "Measured", "Progress", "Result", "measure", "run_bench"]


class Progress(Protocol):
    """Where a person reads how far the benchmark is."""

    def show(self, what: str, part: float) -> None:
        """Say that `part` (0 to 1) of `what` is done."""

    def clear(self) -> None:
        """Take away what was shown."""


@dataclass(frozen=True)
class Measured:
    """One bundle's calls in one measurement, and the calls before them that were not timed."""

    timed: Timed
    warm_up: WarmUp


@dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        scenario: which.
        rows_per_call: rows of each call.
        of: for every bundle, in order. For server, the trial that confirmed the rate.
        ratio: with two bundles, the first one's latency over the second one's, pair by pair.
        server: what the search for a rate found, in scenario server alone.
    """

    scenario: Scenario
    rows_per_call: int
    of: tuple[Measured, ...]
    ratio: PairRatio | None = None
    server: Found | None = None

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C ended it early."""
        return any(measured.timed.is_interrupted for measured in self.of) or (
            self.server is not None and self.server.is_interrupted
        )


@dataclass(frozen=True)
class BenchReport:
    """Everything that there is to say of one benchmark.

    Attributes:
        options: what was asked for.
        environment: what it ran on.
        import_ns: time that importing onnxruntime took.
        rows: what was predicted for.
        subjects: the bundle, and the one that it is compared with.
        results: what was measured, in order.
        is_interrupted: Ctrl-C ended it early.
    """

    options: BenchOptions
    environment: Environment
    import_ns: int
    rows: BenchRows
    subjects: tuple[Subject, ...]
    results: tuple[Result, ...]
    is_interrupted: bool


def run_bench(
    path: Path, load: LoadOptions, options: BenchOptions, *, clock: Clock, progress: Progress
) -> BenchReport:
    """Measure a bundle on this machine; an interrupt leaves what was measured until then.

    Raises:
        BundleError, InputError, ProviderError: as te_runtime.load.
        InputError: a task is not known, what is compared does not go together or is the same, or no rate holds the
            bound of scenario server.
    """
    rows = read_bench_rows(path, options.tasks)
    other = None if options.compare is None else resolve_other(path, load, options.compare)
    if other is not None:
        check_comparable(rows, read_bench_rows(other[0], None))
    begun = clock.wall_ns()
    import_onnxruntime()
    import_ns = clock.wall_ns() - begun
    environment = read_environment()
    subjects: list[Subject] = []
    results: tuple[Result, ...] = ()
    is_interrupted = False
    try:
        progress.show(f"loading {path.name}", 0)
        subjects.append(open_subject(path, rows, load, clock))
        if other is not None:
            progress.show(f"loading {other[0].name}", 0)
            subjects.append(_open_other(*other, rows, clock))
        check_different(subjects, options.compare)
        results, is_interrupted = measure(tuple(subjects), options, clock=clock, progress=progress)
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        progress.clear()
        for subject in subjects:
            subject.close()
    return BenchReport(options, environment, import_ns, rows, tuple(subjects), results, is_interrupted)


def _open_other(path: Path, load: LoadOptions, rows: BenchRows, clock: Clock) -> Subject:
    try:
        return open_subject(path, rows, load, clock)
    except InputError as error:
        raise InputError(f"{path}, which is compared with: {error}") from error


def measure(
    subjects: tuple[Subject, ...], options: BenchOptions, *, clock: Clock, progress: Progress
) -> tuple[tuple[Result, ...], bool]:
    """Make every measurement asked for, server first, since it alone may be refused.

    Returns:
        What was measured, in the order of the options, and whether Ctrl-C ended it early.

    Raises:
        InputError: no rate holds the bound of scenario server.
    """
    steps: list[tuple[Scenario, int]] = []
    for scenario in options.scenarios:
        sizes = {"offline": options.batches, "multi-stream": (MULTI_STREAM_ROWS,)}.get(scenario, (1,))
        steps += [(scenario, size) for size in sizes]
    found: dict[tuple[Scenario, int], Result] = {}
    is_interrupted = False
    try:
        for step in sorted(steps, key=lambda step: step[0] != "server"):
            result = _measure_step(subjects, step, options=options, clock=clock, progress=progress)
            is_interrupted = result.is_interrupted
            if result.server is not None or all(measured.timed.latencies_ns for measured in result.of):
                found[step] = result
            if is_interrupted:
                break
    except KeyboardInterrupt:
        is_interrupted = True
    return tuple(found[step] for step in steps if step in found), is_interrupted


def _measure_step(
    subjects: tuple[Subject, ...],
    step: tuple[Scenario, int],
    *,
    options: BenchOptions,
    clock: Clock,
    progress: Progress,
) -> Result:
    scenario, rows = step
    name = f"{scenario}, {rows} rows" if scenario == "offline" else scenario

    def tick(part: float) -> None:
        progress.show(name, part)

    tick(0)
    if scenario == "server":
        return _measure_server(subjects[0], options, clock=clock, tick=tick)
    duration_ns = options.duration_ns
    calls = [subject.queries(rows) for subject in subjects]
    warm = [warm_up(call, clock, limit_ns=duration_ns) for call in calls]
    if len(calls) == 1:
        timed = measure_calls(calls[0], clock, rows_per_call=rows, duration_ns=duration_ns, tick=tick)
        return Result(scenario, rows, (Measured(timed, warm[0]),))
    pairs = measure_pairs((calls[0], calls[1]), clock, rows_per_call=rows, duration_ns=duration_ns, tick=tick)
    first, second = pairs
    ratio = compare_pairs(first.latencies_ns, second.latencies_ns) if first.latencies_ns else None
    return Result(scenario, rows, tuple(map(Measured, pairs, warm)), ratio)


def _measure_server(subject: Subject, options: BenchOptions, *, clock: Clock, tick: Tick) -> Result:
    """Find the rate; before that, make sure that one query at a time keeps the bound, and how many there can be.

    Raises:
        InputError: it does not, or no rate was found.
    """
    if options.p99_ns is None:
        raise AssertionError("parse_bench_options wants a bound for scenario server")
    bound_ns, duration_ns = options.p99_ns, options.duration_ns
    call = subject.queries(1)
    warm = warm_up(call, clock, limit_ns=duration_ns)
    for _ in range(2):  # one hiccup of the machine must not refuse a bound
        alone = measure_calls(call, clock, rows_per_call=1, duration_ns=duration_ns, tick=lambda _part: None)
        if alone.is_interrupted:
            return Result("server", 1, (), server=Found(None, (), True))
        if summarize(alone.latencies_ns).p99_ns <= bound_ns:
            break
    _check_bound(alone, bound_ns)

    def trial(rate_per_s: float, confirming: bool) -> Trial:
        seed = options.seed + 1 if confirming else options.seed
        return run_trial(
            call, clock, rate_per_s=rate_per_s, bound_ns=bound_ns, duration_ns=duration_ns, seed=seed
        )

    found = find_rate(trial, alone.rows_per_s, tick)
    if found.best is None and not found.is_interrupted:
        raise _no_rate(found, alone, bound_ns)
    best = () if found.best is None else (Measured(found.best.timed, warm),)
    return Result("server", 1, best, server=found)


def _check_bound(alone: Timed, bound_ns: int) -> None:
    p99_ns = summarize(alone.latencies_ns).p99_ns
    if p99_ns > bound_ns:
        raise InputError(
            f"--p99-ms {bound_ns / 1e6:g} cannot be held at any rate: one query at a time takes "
            f"{p99_ns / 1e6:.3g} ms at p99 here. Pass a larger bound, fewer tasks, or a faster --precision"
        )


def _no_rate(found: Found, alone: Timed, bound_ns: int) -> InputError:
    rates = [trial.rate_per_s for trial in found.trials]
    p99_ms = summarize(alone.latencies_ns).p99_ns / 1e6
    return InputError(
        f"--p99-ms {bound_ns / 1e6:g}: no rate held it for certain, from {max(rates):.3g} queries a second down to "
        f"{min(rates):.3g}, although one query after another keeps to {p99_ms:.3g} ms at p99. Pass a larger bound "
        "or a longer --duration, or quiet the machine"
    )

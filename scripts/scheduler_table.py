"""The table of docs/benchmarks.md about the scheduler, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scheduler_deadlines import DEADLINE_MS, OpenLoop
from scheduler_throughput import CLIENTS, MAX_BATCHES, PRECISIONS, QUIET_CPUS, Measured, best

__all__ = [
    "Lonely",
    "Million",
    "Row",
    "lonely_rows",
    "markdown",
    "million_rows",
    "open_rows",
    "throughput_rows",
]

Row = tuple[str, str, str]
_TARGET_OVER_NAIVE = {"fp32": "2.5", "int8": "5"}


@dataclass(frozen=True)
class Lonely:
    """Medians of one repetition, µs: a direct predict, and what the scheduler adds to it.

    Attributes:
        caller: the thread that asks.
    """

    precision: str
    caller: str
    pause_ms: float
    direct_us: float
    extra_us: float


@dataclass(frozen=True)
class Million:
    """What scripts/scheduler_million.py printed.

    Attributes:
        requests: sent.
        seconds: they took.
        ended: how many in which way.
        sizes: now and then, how many were sent, RSS and PSS in bytes; the first after 10,000.
    """

    requests: int
    seconds: float
    ended: Mapping[str, int]
    sizes: Sequence[Sequence[int]]


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = ["| what | target | found: median (smallest to largest) |", "| --- | --- | --- |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def spread(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Median, smallest and largest, and how many."""
    median, low, high = float(np.median(values)), min(values), max(values)
    return f"{median:,.{digits}f}{unit} ({low:,.{digits}f} to {high:,.{digits}f}, n={len(values)})"


def throughput_rows(found: Sequence[Measured]) -> Iterator[Row]:
    """Everything about closed loops."""
    naive, alone = best(found, "naive", "fp32"), best(found, "naive-one-task", "fp32")
    yield _rate_row("naive sessions called directly, fp32, requests over five tasks", naive)
    yield _rate_row("one naive session called directly, fp32, every request for its task", alone)
    for precision in PRECISIONS:
        joint = best(found, "joint", precision)
        yield _rate_row(f"joint graph offline on two threads, {precision}, B={joint[0].case.batch}", joint)
        for batch in MAX_BATCHES:
            own = best(found, "scheduler", precision, batch=batch)
            what = f"scheduler, {precision}, max_batch={batch}"
            yield _rate_row(what, own)
            yield f"{what}, over naive at its best", _TARGET_OVER_NAIVE[precision], spread(ratios(own, naive))
            yield f"{what}, over naive with one task only", "—", spread(ratios(own, alone))
            yield f"{what}, over the joint graph", "0.85", spread(ratios(own, joint))
    yield from _by_clients(found)
    disturbed, runs = sum(one.is_disturbed for one in found), sum(one.attempts for one in found)
    yield (
        f"runs beside which other processes took more than {QUIET_CPUS:g} CPUs, and that count even so",
        "0",
        f"{disturbed} of {len(found)}; {runs - len(found)} were run again",
    )


def ratios(above: Sequence[Measured], below: Sequence[Measured]) -> list[float]:
    """Rates over rates, of the same repetition."""
    pairs = zip(above, below, strict=True)
    return [one.rate.per_s / other.rate.per_s for one, other in pairs]


def open_rows(found: Sequence[OpenLoop]) -> Iterator[Row]:
    """Everything about random arrivals."""
    for precision in PRECISIONS:
        own = [one for one in found if one.precision == precision]
        at, over = f"{precision}, 80 % of capacity", f"{precision}, 300 % of capacity"
        rates = [one.capacity_per_s for one in own]
        yield f"{precision}: capacity, random arrivals", "—", spread(rates, 0, " requests/s")
        shares = [100 * one.steady_in_time for one in own]
        within = f"answered within {DEADLINE_MS:g} ms, of those let in"
        yield f"{at}: {within}", "99.9 %", spread(shares, 2, " %")
        lost = (
            ("refused", [100 * one.steady_refused for one in own]),
            ("not sent, the generator being late", [100 * one.steady_hopeless for one in own]),
        )
        for what, parts in lost:
            yield f"{at}: {what}, of those planned", "—", spread(parts, 2, " %")
        yield (
            f"{at}: let in and ended with an error",
            "—",
            spread([100 * one.steady_expired for one in own], 2, " %"),
        )
        yield f"{at}: latency from planned arrival", "—", _percentiles(own, lambda one: one.steady_latency_ms)
        yield f"{at}: how late the generator was", "—", _percentiles(own, lambda one: one.steady_behind_ms)
        yield f"{over}: rate sent, over capacity", "3", spread([one.overload_sent for one in own])
        goodput = [one.overload_goodput for one in own]
        yield f"{over}: answers in time per second, over capacity", "0.9", spread(goodput)
        others = [max(one.other_cpus) for one in own]
        yield (
            f"{precision}: CPUs that other processes took beside the runs with deadlines",
            "0",
            spread(others),
        )
        yield f"{over}: until a refused one is told", "1 ms", _percentiles(own, lambda one: one.refused_ms)


def lonely_rows(found: Sequence[Lonely]) -> Iterator[Row]:
    """What the scheduler adds to a single request."""
    cases = dict.fromkeys((one.precision, one.caller, one.pause_ms) for one in found)
    for precision, caller, pause_ms in cases:
        own = [
            one for one in found if (one.precision, one.caller, one.pause_ms) == (precision, caller, pause_ms)
        ]
        how = "no pause" if pause_ms == 0 else f"a pause of {pause_ms:g} ms before each"
        extra, direct = ([one.extra_us for one in own], [one.direct_us for one in own])
        shown = f"{spread(extra, 0, ' µs')}; {spread(direct, 0, ' µs')} beneath"
        yield f"one lonely request over a direct predict, {precision}, from {caller}, {how}", "150 µs", shown


def million_rows(million: Million) -> Iterator[Row]:
    """Growth, in KiB."""
    first, last = million.sizes[0], million.sizes[-1]
    half = next(entry for entry in million.sizes if entry[0] >= million.requests / 2)
    ended = ", ".join(f"{count:,} {how}" for how, count in million.ended.items())
    yield f"{million.requests:,} requests: each ended once", "yes", f"yes: {ended}; {million.seconds:.0f} s"
    for place, name in ((1, "RSS"), (2, "PSS")):
        grown, late = ((last[place] - entry[place]) / 1024 for entry in (first, half))
        yield (
            f"{name} growth from request {first[0]:,} on",
            "0",
            f"{grown:,.0f} KiB; {late:,.0f} KiB in the second half; {last[place] / 1024:,.0f} KiB at the end",
        )


def _rate_row(what: str, own: Sequence[Measured]) -> Row:
    clients = own[0].case.clients
    cpus = [one.rate.cpus for one in own]
    client = [one.rate.client_cpus for one in own]
    threads = "1 client thread" if clients == 1 else f"{clients} client threads"
    shown = (
        f"{spread([one.rate.per_s for one in own], 0)}/s; {threads}; "
        f"{np.median(cpus):.2f} CPUs, of them the client threads {np.median(client):.2f}"
    )
    return what, "—", shown


def _by_clients(found: Sequence[Measured]) -> Iterator[Row]:
    """The same number of client threads on both sides, at the default max_batch."""
    for precision in PRECISIONS:
        each = []
        for clients in CLIENTS:
            of_count = [one for one in found if one.case.clients == clients]
            own = best(of_count, "scheduler", precision, batch=MAX_BATCHES[0])
            naive = best(of_count, "naive", "fp32")
            each.append(f"{np.median(ratios(own, naive)):.2f}")
        counts = ", ".join(str(clients) for clients in CLIENTS)
        what = f"scheduler, {precision}, over naive from as many client threads: {counts}"
        yield what, _TARGET_OVER_NAIVE[precision], ", ".join(each)


def _percentiles(own: Sequence[OpenLoop], read: Callable[[OpenLoop], list[float]]) -> str:
    found = [read(one) for one in own if read(one)]
    if not found:
        return "none"
    medians = np.median(np.array(found), axis=0)
    names = ("p50", "p99", "p99.9", "largest")
    return ", ".join(f"{name} {value:.2f} ms" for name, value in zip(names, medians, strict=True))

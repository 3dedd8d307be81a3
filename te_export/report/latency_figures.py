"""What was measured of latency, in rows for a table and in sentences; every report shows the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from te_runtime.manifest import GraphLatency, Latency, Manifest

__all__ = [
    "LATENCY_HEADINGS",
    "LATENCY_NUMBERS",
    "Timed",
    "latency_meaning",
    "latency_row",
    "measured_on",
    "microseconds",
    "timed_graphs",
]

LATENCY_HEADINGS = ("graph", "variant", "rows per call", "median", "over fp32", "10% to 90%", "rounds")
LATENCY_NUMBERS = LATENCY_HEADINGS[2:]


@dataclass(frozen=True)
class Timed:
    """One graph at one batch size.

    Attributes:
        task: None for the joint graph.
    """

    task: str | None
    precision: str
    figures: GraphLatency


def timed_graphs(manifest: Manifest) -> Iterator[Timed]:
    """The joint graphs, then task by task: batch size by batch size, so that variants stand below each other."""
    graphs = () if manifest.latency is None else manifest.latency.graphs
    found = {(entry.path, entry.batch): entry for entry in graphs}
    batches = sorted({entry.batch for entry in graphs})
    for place, task in enumerate((None, *manifest.task_names)):
        for batch in batches:
            for variant in manifest.variants:
                graph = variant.joint if task is None else variant.tasks[place - 1].graph
                entry = found.get((graph.path, batch))
                if entry is not None:
                    yield Timed(task, variant.precision, entry)


def latency_row(timed: Timed) -> tuple[str, ...]:
    """A row under LATENCY_HEADINGS."""
    figures = timed.figures
    return (
        timed.task or "all tasks",
        timed.precision,
        f"{figures.batch:,}",
        microseconds(figures.p50_us),
        f"{figures.ratio:.2f}x",
        f"{microseconds(figures.p10_us)} to {microseconds(figures.p90_us)}",
        f"{figures.rounds:,}",
    )


def latency_meaning(latency: Latency) -> str:
    """What the rows say and what they do not."""
    return (
        f"Measured on {measured_on(latency)}. Each graph took turns with fp32's graph of the same kind: “over fp32” is "
        "the median over rounds of the one over the other in the same round, which a machine that is busy for a while "
        "disturbs less than the times themselves. It is one run on one machine: another gives other figures."
    )


def measured_on(latency: Latency) -> str:
    """Where and how, as the end of a sentence."""
    threads = "one thread" if latency.threads == 1 else f"{latency.threads} threads"
    return f"{latency.machine}, onnxruntime {latency.onnxruntime} on {latency.provider}, {threads}"


def microseconds(latency_us: float) -> str:
    """Three figures: `4.21 µs`, `121 µs`, `1.30 ms`, `12.0 s`."""
    size, unit = next(
        ((size, unit) for size, unit in ((1.0, "µs"), (1e3, "ms")) if latency_us < 999.5 * size), (1e6, "s")
    )
    amount = latency_us / size
    decimals = 2 if amount < 9.995 else 1 if amount < 99.95 else 0
    return f"{amount:,.{decimals}f} {unit}"

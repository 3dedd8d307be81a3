"""What a benchmark is asked to do, parsed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from te_runtime.choices import parse_choice
from te_runtime.errors import InputError
from te_runtime.plan import Mode
from te_runtime.providers import CudaOptions, ProviderName

__all__ = ["BenchOptions", "LoadOptions", "Other", "Scenario", "parse_bench_options"]

Scenario = Literal["single-stream", "multi-stream", "offline", "server"]

MULTI_STREAM_ROWS = 8
MAX_BATCH = 65536
MAX_DURATION_S = 600.0
MAX_P99_MS = 60_000.0


@dataclass(frozen=True)
class LoadOptions:
    """How to load a bundle; as the arguments of te_runtime.load."""

    provider: ProviderName = "cpu"
    cuda: CudaOptions | None = None
    precision: str | None = None
    threads: int | None = None
    mode: Mode | None = None


@dataclass(frozen=True)
class Other:
    """What a bundle is compared with; what is None is as for the first one.

    Attributes:
        path: another bundle, or None for the same.
        precision: which of its variants.
        mode: which of its graphs.
    """

    path: Path | None = None
    precision: str | None = None
    mode: Mode | None = None


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        scenarios: each once, in the order of the report.
        batches: rows per call in scenario offline.
        duration_ns: of one measurement, without its warm-up.
        tasks: which to predict; None for all.
        p99_ns: the bound of scenario server; None without it.
        seed: of the arrivals in scenario server.
        compare: what to take turns with; None for nothing.
    """

    scenarios: tuple[Scenario, ...]
    batches: tuple[int, ...]
    duration_ns: int
    tasks: tuple[str, ...] | None
    p99_ns: int | None
    seed: int
    compare: Other | None


def parse_bench_options(
    *,
    scenarios: Sequence[str],
    batches: str,
    duration_s: float,
    tasks: Sequence[str],
    p99_ms: float | None,
    seed: int,
    compare: Other,
) -> BenchOptions:
    """Check what a user asks for.

    Args:
        scenarios: names; none for single-stream and offline.
        batches: numbers with commas between.
        duration_s: seconds per measurement.
        p99_ms: bound of scenario server in milliseconds.
        compare: what to compare with; nothing where all of it is None.

    Raises:
        InputError: a value is none that there is, or two do not go together.
    """
    chosen = _parse_scenarios(scenarios)
    is_compared = compare != Other()
    if is_compared and "server" in chosen:
        raise InputError(
            "--compare takes turns call by call, which arrivals of scenario server leave no room for: leave "
            "one of them out, and run server on each bundle by itself"
        )
    if ("server" in chosen) != (p99_ms is not None):
        raise InputError(
            "scenario server needs --p99-ms MS: the latency that 99 of 100 queries must keep"
            if p99_ms is None
            else "--p99-ms is the bound of scenario server: add --scenario server, or leave it out"
        )
    bound_ms = None if p99_ms is None else _parse_time("--p99-ms", p99_ms, MAX_P99_MS, "milliseconds")
    return BenchOptions(
        scenarios=chosen,
        batches=_parse_batches(batches),
        duration_ns=max(1, round(_parse_time("--duration", duration_s, MAX_DURATION_S, "seconds") * 1e9)),
        tasks=tuple(tasks) or None,
        p99_ns=None if bound_ms is None else max(1, round(bound_ms * 1e6)),
        seed=seed,
        compare=compare if is_compared else None,
    )


def _parse_scenarios(names: Sequence[str]) -> tuple[Scenario, ...]:
    known = get_args(Scenario)
    asked = [parse_choice("--scenario", name, known) for name in names] or ["single-stream", "offline"]
    return tuple(cast(Scenario, name) for name in known if name in asked)


def _parse_batches(text: str) -> tuple[int, ...]:
    batches: list[int] = []
    for part in text.split(","):
        number = int(part) if part.strip().isdecimal() and len(part) < 10 else 0
        if not 1 <= number <= MAX_BATCH:
            raise InputError(
                f"--batch: found {part.strip()!r:.80}, expected numbers of rows from 1 to {MAX_BATCH} with "
                "commas between, such as 1,8,64"
            )
        if number in batches:
            raise InputError(f"--batch: {number} is there twice, expected each number once")
        batches.append(number)
    return tuple(batches)


def _parse_time(option: str, value: float, highest: float, unit: str) -> float:
    if not (math.isfinite(value) and 0 < value <= highest):
        raise InputError(f"{option}: found {value:g}, expected more than 0 and at most {highest:g} {unit}")
    return value

"""What a scheduler is asked for, parsed once."""

from __future__ import annotations

from numbers import Real
from typing import Literal, NamedTuple, get_args

from te_runtime.choices import parse_choice, parse_number
from te_runtime.errors import InputError
from te_runtime.scheduling.dispatcher import Limits

__all__ = [
    "MAX_PRIORITY",
    "SchedulerOptions",
    "WhenFull",
    "parse_deadline_ns",
    "parse_priority",
    "parse_scheduler_options",
]

WhenFull = Literal["refuse", "block"]

MAX_PRIORITY = 100.0
_MAX_BATCH = 65536
_MAX_QUEUE = 10_000_000
_MAX_EXECUTORS = 1024
_MAX_MS = 86_400_000.0
_NS_PER_MS = 1e6


class SchedulerOptions(NamedTuple):
    """Checked options.

    Attributes:
        limits: what the dispatcher keeps to.
        executors: how many for each model on the CPU; None to decide by the CPUs there are.
        when_full: what submit does when the queue is full.
    """

    limits: Limits
    executors: int | None
    when_full: WhenFull


def parse_scheduler_options(
    *,
    max_batch: int,
    max_delay_ms: float,
    max_queue: int,
    executors: int | None,
    when_full: str,
    patience_ms: float,
    stall_timeout_s: float,
) -> SchedulerOptions:
    """Check what a caller asks for.

    Raises:
        InputError: a value is not what it must be.
    """
    limits = Limits(
        max_batch=parse_number("max_batch", max_batch, 1, _MAX_BATCH),
        max_delay_ns=_parse_ms("max_delay_ms", max_delay_ms, lowest=0.0),
        max_queue=parse_number("max_queue", max_queue, 1, _MAX_QUEUE),
        patience_ns=_parse_ms("patience_ms", patience_ms, lowest=0.0),
        stall_ns=_parse_ms("stall_timeout_s", stall_timeout_s, lowest=1e-3, highest=_MAX_MS / 1e3, unit=1e9),
    )
    count = None if executors is None else parse_number("executors", executors, 1, _MAX_EXECUTORS)
    return SchedulerOptions(limits, count, parse_choice("when_full", when_full, get_args(WhenFull)))


def parse_priority(priority: float) -> float:
    """A priority in points, 0 to 100.

    Raises:
        InputError: it is another thing.
    """
    if _is_number(priority) and 0 <= priority <= MAX_PRIORITY:
        return float(priority)
    raise InputError(f"priority: found {priority!r:.80}, expected a number from 0 to {MAX_PRIORITY:g}")


def parse_deadline_ns(deadline_ms: float | None) -> int | None:
    """Nanoseconds from submission to deadline, or None.

    Raises:
        InputError: it is neither None nor a number above 0.
    """
    if deadline_ms is None:
        return None
    if (type(deadline_ms) is float or _is_number(deadline_ms)) and 0 < deadline_ms <= _MAX_MS:
        return max(1, round(float(deadline_ms) * _NS_PER_MS))
    raise InputError(
        f"deadline_ms: found {deadline_ms!r:.80}, expected milliseconds from submission, more than 0 and at most "
        f"{_MAX_MS:g}, or None for no deadline"
    )


def _parse_ms(
    what: str, value: float, *, lowest: float, highest: float = _MAX_MS, unit: float = _NS_PER_MS
) -> int:
    if _is_number(value) and lowest <= value <= highest:
        return round(float(value) * unit)
    raise InputError(f"{what}: found {value!r:.80}, expected a number from {lowest:g} to {highest:g}")


def _is_number(value: object) -> bool:
    """Whether it can be held against bounds, which NaN and what is not finite are not within."""
    return type(value) is not bool and isinstance(value, Real)

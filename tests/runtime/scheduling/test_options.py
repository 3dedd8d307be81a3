from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from te_runtime import InputError
from te_runtime.scheduling.dispatcher import Limits
from te_runtime.scheduling.options import parse_deadline_ns, parse_priority, parse_scheduler_options

GOOD: dict[str, Any] = {
    "max_batch": 64,
    "max_delay_ms": 1.0,
    "max_queue": 1024,
    "executors": None,
    "when_full": "refuse",
    "patience_ms": 1000.0,
    "stall_timeout_s": 10.0,
}
NO_NUMBERS = [
    "1",
    b"1",
    "",
    True,
    False,
    [1],
    (),
    {},
    1j,
    Decimal(1),
    object(),
    np.array([1.0, 2.0]),
    np.True_,
]
NOT_FINITE = [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf"), 10**400, -(10**400)]


def shown(value: object) -> str:
    """A short name for a test."""
    return repr(value)[:16]


def test_good_options() -> None:
    options = parse_scheduler_options(**GOOD)
    assert options.limits == Limits(64, 1_000_000, 1024, 1_000_000_000, 10_000_000_000)
    assert (options.executors, options.when_full) == (None, "refuse")


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("max_batch", np.int32(3), "max_batch", 3),
        ("max_delay_ms", 0, "max_delay_ns", 0),
        ("max_delay_ms", np.float32(0.5), "max_delay_ns", 500_000),
        ("max_delay_ms", Fraction(1, 4), "max_delay_ns", 250_000),
        ("max_delay_ms", 86_400_000, "max_delay_ns", 86_400_000_000_000),
        ("max_queue", 1, "max_queue", 1),
        ("patience_ms", 0.0, "patience_ns", 0),
        ("stall_timeout_s", 0.001, "stall_ns", 1_000_000),
    ],
)
def test_other_kinds_of_numbers_will_do(name: str, value: object, field: str, expected: int) -> None:
    limits = parse_scheduler_options(**{**GOOD, name: value}).limits
    found = getattr(limits, field)
    assert found == expected
    assert type(found) is int


@pytest.mark.parametrize("name", ["max_delay_ms", "patience_ms", "stall_timeout_s"])
@pytest.mark.parametrize("value", [*NO_NUMBERS, *NOT_FINITE, None, -1, -1e-9, 1e12], ids=shown)
def test_times_that_cannot_be_meant_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^{name}: found .*, expected a number from "):
        parse_scheduler_options(**{**GOOD, name: value})


def test_a_stall_limit_of_nothing_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^stall_timeout_s: found 0, expected a number from 0\.001 to 86400$"
    ):
        parse_scheduler_options(**{**GOOD, "stall_timeout_s": 0})


@pytest.mark.parametrize("name", ["max_batch", "max_queue", "executors"])
@pytest.mark.parametrize("value", [*NO_NUMBERS, *NOT_FINITE, 0, -1, 1.0, 1.5, np.float32(2)], ids=shown)
def test_counts_that_cannot_be_meant_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^{name}: found .*, expected a whole number from 1 to "):
        parse_scheduler_options(**{**GOOD, name: value})


@pytest.mark.parametrize("value", ["wait", "", "Refuse", None, 1, True, ["refuse"]], ids=shown)
def test_another_way_when_full_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"^when_full: found .*, expected 'refuse' or 'block'$"):
        parse_scheduler_options(**{**GOOD, "when_full": value})


@pytest.mark.parametrize("value", [0, 0.0, 1, 99.5, 100, np.float32(7), np.int8(3), Fraction(1, 2), True + 1])
def test_good_priorities(value: Any) -> None:
    found = parse_priority(value)
    assert type(found) is float
    assert found == value


@pytest.mark.parametrize("value", [*NO_NUMBERS, *NOT_FINITE, None, -1, -1e-9, 100.1, 101], ids=shown)
def test_priorities_that_cannot_be_meant_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^priority: found .*, expected a number from 0 to 100$"):
        parse_priority(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (20, 20_000_000),
        (0.5, 500_000),
        (1e-9, 1),
        (np.float32(0.25), 250_000),
        (np.int64(3), 3_000_000),
        (86_400_000, 86_400_000_000_000),
    ],
)
def test_good_deadlines(value: Any, expected: int | None) -> None:
    found = parse_deadline_ns(value)
    assert found == expected
    assert found is None or type(found) is int


@pytest.mark.parametrize("value", [*NO_NUMBERS, *NOT_FINITE, 0, 0.0, -0.0, -1, -1e-9, 86_400_001], ids=shown)
def test_deadlines_that_cannot_be_meant_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^deadline_ms: found .*, expected milliseconds from submission"):
        parse_deadline_ns(value)

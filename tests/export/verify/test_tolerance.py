"""The bound: 4 times torch's own error, a floor where torch was lucky, or the caller's own."""

from __future__ import annotations

import numpy as np
import pytest

from te_export.errors import UsageError
from te_export.verify.tolerance import FLOOR_ULPS, TORCH_FACTOR, Tolerance

EPS = float(np.finfo(np.float32).eps)
ORACLE = np.array([[1.0, -8.0], [0.5, 2.0]])


def test_four_times_torch_counts_where_torch_errs_much() -> None:
    assert Tolerance().bound(ORACLE, torch_error=1e-3, noise=0.0) == TORCH_FACTOR * 1e-3 == 4e-3


def test_the_floor_counts_where_torch_errs_little() -> None:
    assert Tolerance().bound(ORACLE, torch_error=0.0, noise=0.0) == FLOOR_ULPS * EPS * 8.0 == 16 * EPS * 8.0


def test_simulated_rounding_counts_where_it_is_larger() -> None:
    assert Tolerance().bound(ORACLE, torch_error=1e-3, noise=2e-3) == 8e-3
    assert Tolerance().bound(ORACLE, torch_error=2e-3, noise=1e-3) == 8e-3


@pytest.mark.parametrize("value", [-1e-9, -1.0, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("which", ["atol", "rtol"])
def test_a_tolerance_that_is_no_finite_number_is_refused(which: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{which} .*expected a finite number of at least 0"):
        Tolerance(**{which: value})


def test_an_output_that_is_zero_throughout_must_be_zero() -> None:
    bound = Tolerance().bound(np.zeros((2, 2)), torch_error=0.0, noise=0.0)

    assert bound == 0.0
    assert Tolerance().passes(np.zeros((2, 2)), np.zeros((2, 2)), bound)
    assert not Tolerance().passes(np.full((2, 2), 1e-30), np.zeros((2, 2)), bound)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("tolerance", [Tolerance(), Tolerance(atol=1e300), Tolerance(rtol=1e300)])
def test_one_value_that_is_no_number_fails(bad: float, tolerance: Tolerance) -> None:
    error = np.array([[0.0, 0.0], [0.0, bad]])

    assert not tolerance.passes(error, ORACLE, 1e30)


def test_one_value_out_of_bound_fails() -> None:
    error = np.zeros((2, 2))
    error[1, 0] = 0.011

    assert not Tolerance().passes(error, ORACLE, 0.01)
    assert Tolerance().passes(error, ORACLE, 0.011)


@pytest.mark.parametrize(
    ("tolerance", "error", "passes"),
    [
        (Tolerance(atol=0.1), [[0.1, 0.1], [0.1, 0.1]], True),
        (Tolerance(atol=0.1), [[0.1, 0.11], [0.1, 0.1]], False),
        (Tolerance(rtol=0.1), [[0.1, 0.8], [0.05, 0.2]], True),
        (Tolerance(rtol=0.1), [[0.1, 0.1], [0.06, 0.1]], False),  # 0.06 of 0.5, though 8.0 would allow it
        (Tolerance(atol=0.01, rtol=0.1), [[0.11, 0.81], [0.06, 0.21]], True),
        (Tolerance(atol=0.0), [[0.0, 0.0], [0.0, 1e-12]], False),
    ],
)
def test_the_callers_tolerance_is_judged_element_by_element(
    tolerance: Tolerance, error: list[list[float]], passes: bool
) -> None:
    assert tolerance.is_callers
    assert tolerance.passes(np.array(error), ORACLE, bound=0.0) is passes


def test_the_callers_bound_is_the_loosest_elements() -> None:
    assert Tolerance(atol=0.5, rtol=0.25).bound(ORACLE, torch_error=1e9, noise=1e9) == 0.5 + 0.25 * 8.0


def test_zero_given_by_the_caller_is_not_the_default() -> None:
    assert not Tolerance().is_callers
    assert Tolerance(atol=0.0).is_callers
    assert Tolerance(rtol=0.0).bound(ORACLE, torch_error=1.0, noise=1.0) == 0.0

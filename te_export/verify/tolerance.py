"""How far from the oracle a graph's output may be.

The yardstick is torch's own float32: over the same group of rows, run in the same batches, a graph may err
at most
4 times as far as torch does. Where torch's error is by luck near nothing, a floor takes over: the largest of

- 4 times the deviation that simulated float32 rounding causes in the oracle (verify/oracle.py). Rows near a tie
  between experts, or whose head cancels large features, multiply every rounding; there torch's error is one
  draw
  of a wide distribution, and the simulation says how wide.
- 16 units in the last place (2^-23) of the group's largest magnitude, about 2e-6 of it, for outputs of so few
  terms that nothing else is left (a routing weight of exactly 1).

A lost or swapped parameter moves outputs by thousands of times as much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from te_export.errors import UsageError
from te_export.verify.oracle import UNIT_ROUNDOFF

__all__ = ["TORCH_FACTOR", "Tolerance"]

TORCH_FACTOR = 4.0
FLOOR_ULPS = 16.0


@dataclass(frozen=True)
class Tolerance:
    """The default bound, or the caller's own: |error| <= atol + rtol·|oracle| for every element.

    Raises:
        UsageError: atol or rtol is negative, infinite or NaN.
    """

    atol: float | None = None
    rtol: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("--atol", self.atol), ("--rtol", self.rtol)):
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise UsageError(f"{name} {value}: expected a finite number of at least 0")

    @property
    def is_callers(self) -> bool:
        return self.atol is not None or self.rtol is not None

    def bound(self, oracle: NDArray[np.float64], *, torch_error: float, noise: float) -> float:
        """The largest absolute error allowed anywhere in a group of rows.

        Args:
            oracle: the group's oracle outputs.
            torch_error: torch float32's own largest absolute error in the group.
            noise: the largest deviation that simulated float32 rounding caused in the group.

        Returns:
            The bound; with the caller's own tolerance, that of the largest element.
        """
        scale = float(np.abs(oracle).max())
        if self.is_callers:
            return (self.atol or 0.0) + (self.rtol or 0.0) * scale
        return max(TORCH_FACTOR * torch_error, TORCH_FACTOR * noise, FLOOR_ULPS * 2.0 * UNIT_ROUNDOFF * scale)

    def passes(self, error: NDArray[np.float64], oracle: NDArray[np.float64], bound: float) -> bool:
        """Whether every element's absolute error is allowed; NaN never is."""
        if self.is_callers:
            allowed = (self.atol or 0.0) + (self.rtol or 0.0) * np.abs(oracle)
            return bool((error <= allowed).all())
        return bool((error <= bound).all())

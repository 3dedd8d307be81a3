"""How far from the oracle a graph's output may be.

The yardstick is torch's own float32: over the same group of rows, a graph may err at most 4 times as far as
torch does. Where torch's error is by luck near nothing (a routing weight of exactly 1, an output of few
terms), a floor takes over: 16 units in the last place (2^-23) of the group's largest magnitude. Reordering
a sum of n products moves its result by about sqrt(n)/2 such units for the magnitudes that occur on the way;
16 allows for sums of 1,000 terms and is a relative error of 2e-6, far below what a lost or swapped
parameter causes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Tolerance"]

TORCH_FACTOR = 4.0
FLOOR_ULPS = 16.0


@dataclass(frozen=True)
class Tolerance:
    """The default bound, or the caller's own: |error| <= atol + rtol·|oracle| for every element."""

    atol: float | None = None
    rtol: float | None = None

    @property
    def is_callers(self) -> bool:
        return self.atol is not None or self.rtol is not None

    def bound(self, oracle: NDArray[np.float64], torch_max_abs_error: float) -> float:
        """The largest absolute error allowed anywhere in a group of rows whose oracle outputs are `oracle`.

        With the caller's own tolerance this is the loosest element's; `excess` judges element by element.
        """
        scale = float(np.abs(oracle).max())
        if self.is_callers:
            return (self.atol or 0.0) + (self.rtol or 0.0) * scale
        return max(TORCH_FACTOR * torch_max_abs_error, FLOOR_ULPS * float(np.finfo(np.float32).eps) * scale)

    def passes(self, error: NDArray[np.float64], oracle: NDArray[np.float64], bound: float) -> bool:
        """Whether every element's absolute error is allowed; NaN never is."""
        if self.is_callers:
            allowed = (self.atol or 0.0) + (self.rtol or 0.0) * np.abs(oracle)
            return bool((error <= allowed).all())
        return bool((error <= bound).all())

"""How far the numbers of one weight moved, block by block."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from te_export.compare_bundles.result import ValueChange
from te_export.compare_bundles.stored_tensor import StoredTensor

__all__ = ["measure_change"]


def measure_change(before: StoredTensor, after: StoredTensor) -> ValueChange | None:
    """Compare two tensors of one data type and one logical shape; None where every bit is the same.

    Sums are in float64; no more than one block of each tensor is held.

    Raises:
        BundleError: a file cannot be read.
    """
    if before.lies_as(after):
        return None
    changed, largest = 0, 0.0
    squares = np.zeros(3)  # of the difference, of before, of after
    for old, new in zip(before.blocks(), after.blocks(), strict=True):
        changed += int(np.count_nonzero(_bits(old) != _bits(new)))
        if before.is_measurable:
            with np.errstate(all="ignore"):  # what is not finite is told as such
                wide, other = old.astype(np.float64), new.astype(np.float64)
                moved = other - wide
                largest = float(np.maximum(largest, np.abs(moved).max(initial=0.0)))
                squares += (moved @ moved, wide @ wide, other @ other)
    if not changed:
        return None
    if not before.is_measurable:
        return ValueChange(before.size, changed, None, None, None, None)
    figures = (largest, *(math.sqrt(total / before.size) if total >= 0 else math.nan for total in squares))
    if not all(math.isfinite(figure) for figure in figures):
        return ValueChange(before.size, changed, None, None, None, None)
    return ValueChange(before.size, changed, *figures)


def _bits(block: NDArray[np.generic]) -> NDArray[np.generic]:
    return block.view(np.dtype(f"u{block.dtype.itemsize}"))

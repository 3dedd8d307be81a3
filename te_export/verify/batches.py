"""In which batches the probe rows are run, by torch and by every graph alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["BATCH_SIZES", "plan_batches"]

BATCH_SIZES = (64, 1, 2, 7)
_BATCHES_OF_SMALL_SIZES = 8


def plan_batches(rows: int) -> list[NDArray[np.int64]]:
    """Row indices of each batch.

    First all rows in order, in batches of 64 (the last one shorter); then eight batches each of 1, 2 and 7
    rows,
    at even distances, so that every group of rows is run at every size. Kernels differ between batch sizes,
    and so do their roundings.
    """
    planned = [
        np.arange(start, min(start + BATCH_SIZES[0], rows)) for start in range(0, rows, BATCH_SIZES[0])
    ]
    for size in BATCH_SIZES[1:]:
        count = size * _BATCHES_OF_SMALL_SIZES
        spread = ((np.arange(count) + 0.5) * rows / count).astype(np.int64)
        planned += list(spread.reshape(size, _BATCHES_OF_SMALL_SIZES).T)
    return planned

"""Batches that are too large for one run: cut into parts, and the answers joined again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from te_runtime.choices import parse_number
from te_runtime.executor import Executor
from te_runtime.prediction import Prediction

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["parse_max_batch", "predict_in_parts"]


def parse_max_batch(max_batch: int | None) -> int | None:
    """The most rows to run at once, or None for no limit.

    Raises:
        InputError: it is not a whole number from 1.
    """
    return None if max_batch is None else parse_number("max_batch", max_batch, 1)


def predict_in_parts(
    executor: Executor,
    feeds: Mapping[str, NDArray[np.generic]],
    rows: int,
    tasks: Sequence[str],
    *,
    max_batch: int,
) -> dict[str, Prediction]:
    """As Executor.run, with at most `max_batch` rows in one run.

    Args:
        feeds: C-contiguous arrays with the rows as their first axis.
        rows: how many rows they have, at least one.
    """
    parts = []
    for start in range(0, rows, max_batch):
        stop = min(start + max_batch, rows)
        part = {name: array[start:stop] for name, array in feeds.items()}
        parts.append(executor.run(part, stop - start, tasks))
    return {task: _joined([part[task] for part in parts]) for task in tasks}


def _joined(parts: Sequence[Prediction]) -> Prediction:
    output = np.concatenate([part.output for part in parts])
    weights = [part.routing_weights for part in parts if part.routing_weights is not None]
    return Prediction(output, np.concatenate(weights) if weights else None, parts[0].provider)

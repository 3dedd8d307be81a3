"""Predicting different tasks for different rows of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from te_runtime.prediction import Prediction

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["RowPart", "Rows", "pick_parts"]

Rows: TypeAlias = "slice | NDArray[np.intp] | None"
"""Some rows of a batch: a slice of length one step, their numbers, or None for all of them."""


class RowPart(NamedTuple):
    """The rows that one task is wanted for.

    Attributes:
        task: its name.
        rows: which rows of the batch.
        size: how many, at least one.
    """

    task: str
    rows: Rows
    size: int


def pick_parts(found: Mapping[str, Prediction], parts: Sequence[RowPart]) -> list[Prediction]:
    """For each part its rows out of predictions that were made for every row."""
    return [
        found[part.task]
        if part.rows is None
        else Prediction(
            found[part.task].output[part.rows],
            None if (weights := found[part.task].routing_weights) is None else weights[part.rows],
            found[part.task].provider,
        )
        for part in parts
    ]

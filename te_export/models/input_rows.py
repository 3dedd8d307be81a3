"""Rows of the model's inputs: one array per input, all of as many rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["InputRows", "join_rows"]


@dataclass(frozen=True)
class InputRows:
    """N rows of every input.

    Attributes:
        arrays: (N, …) by the name of the input, in the order of the model's inputs.
    """

    arrays: Mapping[str, NDArray[np.generic]]

    def __post_init__(self) -> None:
        if len({len(array) for array in self.arrays.values()}) != 1:
            shapes = {name: array.shape for name, array in self.arrays.items()}
            raise ValueError(f"inputs have shapes {shapes}, expected one number of rows")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, rows: slice | NDArray[np.integer] | Sequence[int]) -> InputRows:
        """Some of the rows, by a slice or by their indices."""
        return InputRows({name: np.ascontiguousarray(array[rows]) for name, array in self.arrays.items()})

    def feeds(self, names: Iterable[str]) -> dict[str, NDArray[np.generic]]:
        """What a session that reads the inputs `names` is fed."""
        return {name: self.arrays[name] for name in names}

    def tensors(self) -> tuple[Tensor, ...]:
        """What the module's forward takes: copies, for it may write to them."""
        return tuple(torch.from_numpy(np.array(array, order="C")) for array in self.arrays.values())

    @property
    def has_floats(self) -> bool:
        """Whether any input is of a floating dtype."""
        return any(array.dtype.kind == "f" for array in self.arrays.values())


def join_rows(parts: Sequence[InputRows]) -> InputRows:
    """Rows of several, one after the other."""
    return InputRows(
        {name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays}
    )

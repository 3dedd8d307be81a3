"""Checks on a whole state dict that no single tensor shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from te_export.checkpoint.shown import shown
from te_export.errors import CheckpointError

__all__ = ["require_sound_state"]

_MAX_OVERLAP: Final = 16


def require_sound_state(state: Mapping[str, torch.Tensor]) -> None:
    """Refuse a state dict that is far larger than the memory it lies in, or whose booleans are none.

    A few parameters may share their memory (tied weights); a thousand names for the same gigabyte would make
    every later step take a thousand times as long as the file suggests.

    Args:
        state: parameter name to dense CPU tensor.

    Raises:
        CheckpointError: naming the sizes, or the parameter.
    """
    size_bytes = sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    storages = [tensor.untyped_storage() for tensor in state.values()]
    held_bytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if size_bytes > _MAX_OVERLAP * held_bytes:
        raise CheckpointError(
            f"{len(state)} parameters of {size_bytes} bytes lie in {held_bytes} bytes of storage, expected "
            f"at most {_MAX_OVERLAP} times that; save copies of those that share memory"
        )
    for name, tensor in state.items():
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise CheckpointError(
                f"parameter {shown(name)}: is of dtype bool and holds bytes other than 0 and 1; the file is "
                "damaged"
            )

"""Writing a checkpoint file: it appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

__all__ = ["write_checkpoint"]


def write_checkpoint(path: str | Path, contents: Mapping[str, object]) -> None:
    """Writes what `torch.load` reads back.

    Args:
        path: of the file; its folder must exist, and a file that is there is replaced.
        contents: tensors, numbers, texts, and lists and dicts of them, so that `weights_only=True` reads it.

    Raises:
        OSError: the file cannot be written; what was at `path` is unchanged.
    """
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as file:
            torch.save(dict(contents), file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)

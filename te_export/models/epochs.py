"""Going over training rows in batches, in a new order every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ReportEpoch", "run_epochs"]

ReportEpoch = Callable[[int, float], None]
"""Told of an epoch, from 1, and its mean loss."""


def run_epochs(
    step: Callable[[Tensor], float],
    rows: int,
    *,
    epochs: int,
    batch_rows: int,
    seed: int,
    report: ReportEpoch | None = None,
) -> list[float]:
    """Calls `step` with the row indices (≤ batch_rows,) int64 of every batch.

    Args:
        step: makes one update, and returns its loss.
        rows: how many there are.
        seed: of the orders.

    Returns:
        The mean loss of every epoch.
    """
    order = torch.Generator().manual_seed(seed)
    means = []
    for epoch in range(1, epochs + 1):
        losses = [step(batch) for batch in torch.split(torch.randperm(rows, generator=order), batch_rows)]
        means.append(math.fsum(losses) / len(losses))
        if report is not None:
            report(epoch, means[-1])
    return means

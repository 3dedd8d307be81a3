"""Inputs that a parity check can trust: ordinary, large and tiny ones, and rows that make different experts
win.

A check on one ordinary input has been seen to pass graphs that had lost most of their experts: rows have to
move the routing. All rows follow from a fixed seed and the model alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from te_export.errors import GateError
from te_export.models.exportable import ExportableModel
from te_export.verify.oracle import evaluate_float32

__all__ = ["ORDINARY", "ProbeRows", "make_probe_rows"]

ORDINARY = "ordinary"
_SEED = 20_240_229
_ROWS = 1_040
_FEWEST_ROWS = 208
_ROWS_TIMES_BYTES = 2.5e10
"""Rows are fewer for models so large that 1,040 rows in float64 would take minutes; never fewer than 208."""
_ASCENT_STEPS = 12


@dataclass(frozen=True)
class ProbeRows:
    """Rows (N, input_dim) float32 in consecutive groups.

    Attributes:
        groups: (name, first row, row after the last) of each group, in order, without gaps.
    """

    x: NDArray[np.float32]
    groups: tuple[tuple[str, int, int], ...]

    def __len__(self) -> int:
        return len(self.x)


def make_probe_rows(model: ExportableModel) -> ProbeRows:
    """Make the rows for one model: 8/13 ordinary, 2/13 large, 1/13 tiny, 2/13 routing.

    Raises:
        GateError: torch's own float32 outputs are not finite even on ordinary inputs.
    """
    unit = max(_FEWEST_ROWS, min(_ROWS, int(_ROWS_TIMES_BYTES / max(1, model.parameter_bytes)))) // 13
    rng = np.random.default_rng(_SEED)
    ordinary = _ordinary(rng, 8 * unit, model.input_dim)
    tiny = (rng.standard_normal((unit, model.input_dim)) * 10.0 ** rng.uniform(-6, -1, (unit, 1))).astype(
        np.float32
    )
    tiny[0] = 0.0
    large = _large(model, rng, 2 * unit)
    routing = _routing(model, np.concatenate([ordinary, large, tiny]), 2 * unit)
    parts = [(ORDINARY, ordinary), ("large", large), ("tiny", tiny), ("routing", routing)]
    ends = np.cumsum([len(rows) for _, rows in parts]).tolist()
    groups = tuple((name, end - len(rows), end) for (name, rows), end in zip(parts, ends, strict=True))
    return ProbeRows(x=np.concatenate([rows for _, rows in parts]), groups=groups)


def _ordinary(rng: np.random.Generator, rows: int, width: int) -> NDArray[np.float32]:
    """Half standard normal (standardized tables), half uniform in 0..1 (images)."""
    half = rows // 2
    normal = rng.standard_normal((rows - half, width), dtype=np.float32)
    return np.concatenate([normal, rng.random((half, width), dtype=np.float32)])


def _large(model: ExportableModel, rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    """Normal rows scaled by 10 to 1000, less where torch's float32 outputs would overflow."""
    directions = rng.standard_normal((rows, model.input_dim))
    for power in (3.0, 2.0, 1.0, 0.0):
        scale = 10.0 ** rng.uniform(min(1.0, power), power, (rows, 1)) if power else 1.0
        large = (directions * scale).astype(np.float32)
        if all(
            bool(torch.isfinite(output).all())
            for output in evaluate_float32(model.module, torch.from_numpy(large))
        ):
            return large
    raise GateError(
        "torch's own float32 outputs are infinite or NaN on standard normal inputs: this model overflows "
        "float32, "
        "so no export of it can be right. Check the checkpoint, or train with weight decay."
    )


def _routing(model: ExportableModel, pool: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """For each task and expert the row of the pool that gives the expert most weight, then pushed further
    along the gradient.
    """
    weights = _routing_weights(model, torch.from_numpy(pool))  # (T, N, K)
    pairs = _hardest_pairs(weights, rows)
    rounds = rows // (weights.shape[0] * weights.shape[2]) + 1
    best = weights.topk(min(rounds, len(pool)), dim=1).indices  # (T, rounds, K) row indices
    starts = [int(best[task, turn % best.shape[1], expert]) for turn, task, expert in pairs]
    return _ascend(model, torch.from_numpy(pool[starts]), [(task, expert) for _, task, expert in pairs])


def _routing_weights(model: ExportableModel, x: Tensor) -> Tensor:
    return torch.stack(evaluate_float32(model.module, x)[2::2])


def _hardest_pairs(weights: Tensor, count: int) -> list[tuple[int, int, int]]:
    """`count` times (round, task, expert): the expert that comes least near to winning in the pool first,
    round again where pairs are few.
    """
    experts = weights.shape[2]
    order = torch.argsort(weights.amax(dim=1).flatten(), stable=True).tolist()
    return [(turn // len(order), *divmod(order[turn % len(order)], experts)) for turn in range(count)]


def _ascend(model: ExportableModel, x: Tensor, pairs: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
    """Follow the gradient of each row's own log routing weight for a few steps; rows that would leave
    float32 stay where they are.
    """
    tasks = torch.tensor([task for task, _ in pairs])
    experts = torch.tensor([expert for _, expert in pairs])
    rows = torch.arange(len(pairs))
    step = x.abs().mean(dim=1, keepdim=True).clamp_min(1e-2)
    for _ in range(_ASCENT_STEPS):
        x = x.detach().requires_grad_(True)
        weights = torch.stack(model.module(x)[2::2])  # (T, N, K)
        chosen = weights[tasks, rows, experts].clamp_min(1e-30).log().sum()
        (gradient,) = torch.autograd.grad(chosen, x)
        moved = x + step * gradient / gradient.abs().mean(dim=1, keepdim=True).clamp_min(1e-12)
        x = torch.where(torch.isfinite(moved).all(dim=1, keepdim=True), moved, x)
    return x.detach().numpy()

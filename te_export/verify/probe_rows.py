"""Inputs that a parity check can trust: ordinary, large and tiny ones, and rows that make different experts
win.

A check on one ordinary input has been seen to pass graphs that had lost most of their experts: rows have to
move
the routing. All rows follow from a fixed seed and the model alone.
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

__all__ = ["ORDINARY", "ProbeRows", "make_probe_rows"]

ORDINARY = "ordinary"
_SEED = 20_240_229
_UNITS = 13
_ROWS = 40 * _UNITS
_FEWEST_ROWS = 20 * _UNITS
_ROWS_TIMES_BYTES = 5e10
"""Rows are fewer where running every graph over them would take minutes: bytes of weights read per row,
times rows.
"""
_LARGEST_SCALE = 100.0
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
    """Make 260 to 520 rows for one model: 8/13 ordinary, 2/13 large, 1/13 tiny, 2/13 routing.

    Raises:
        GateError: torch's own float32 outputs are not finite even on ordinary inputs.
    """
    unit = _row_count(model) // _UNITS
    rng = np.random.default_rng(_SEED)
    ordinary = _ordinary(rng, 8 * unit, model.input_dim)
    large = _large(model, rng, 2 * unit)
    tiny = _tiny(rng, unit, model.input_dim)
    routing = _routing(model, np.concatenate([ordinary, large, tiny]), 2 * unit)
    parts = [(ORDINARY, ordinary), ("large", large), ("tiny", tiny), ("routing", routing)]
    ends = np.cumsum([len(rows) for _, rows in parts]).tolist()
    groups = tuple((name, end - len(rows), end) for (name, rows), end in zip(parts, ends, strict=True))
    return ProbeRows(x=np.concatenate([rows for _, rows in parts]), groups=groups)


def _row_count(model: ExportableModel) -> int:
    """Every task graph reads the whole trunk again, so rows get fewer with tasks as with size."""
    read_bytes = 2 * model.parameter_bytes + len(model.tasks) * model.bytes_of(model.trunk_parameters)
    return max(_FEWEST_ROWS, min(_ROWS, int(_ROWS_TIMES_BYTES / read_bytes)))


def _ordinary(rng: np.random.Generator, rows: int, width: int) -> NDArray[np.float32]:
    """Half standard normal (standardized tables), half uniform in 0..1 (images)."""
    half = rows // 2
    normal = rng.standard_normal((rows - half, width), dtype=np.float32)
    return np.concatenate([normal, rng.random((half, width), dtype=np.float32)])


def _tiny(rng: np.random.Generator, rows: int, width: int) -> NDArray[np.float32]:
    """Normal rows scaled by 1e-6 to 0.1, and one row of zeros."""
    tiny = rng.standard_normal((rows, width)) * 10.0 ** rng.uniform(-6.0, -1.0, (rows, 1))
    tiny[0] = 0.0
    return tiny.astype(np.float32)


def _large(model: ExportableModel, rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    """Normal rows scaled by up to 100, less where torch's float32 outputs would overflow."""
    directions = rng.standard_normal((rows, model.input_dim))
    for largest in (_LARGEST_SCALE, 10.0, 1.0):
        scale = largest ** rng.uniform(0.5, 1.0, (rows, 1))
        large = (directions * scale).astype(np.float32)
        if bool(_is_finite(model, torch.from_numpy(large)).all()):
            return large
    raise GateError(
        "torch's own float32 outputs are infinite or NaN on standard normal inputs: this model overflows "
        "float32, so no export of it can be right. Check the checkpoint, or train with weight decay."
    )


def _routing(model: ExportableModel, pool: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """For a task and expert, the row of the pool that gives the expert most weight, pushed further along the
    gradient."""
    weights = _routing_weights(model, torch.from_numpy(pool))  # (T, N, K)
    chosen = _hardest(weights, rows)
    rounds = rows // (weights.shape[0] * weights.shape[2]) + 1
    best = weights.topk(min(rounds, len(pool)), dim=1).indices  # (T, rounds, K) row indices
    starts = [int(best[task, turn % best.shape[1], expert]) for turn, task, expert in chosen]
    return _ascend(model, torch.from_numpy(pool[starts]), [(task, expert) for _, task, expert in chosen])


@torch.no_grad()
def _routing_weights(model: ExportableModel, x: Tensor) -> Tensor:
    return torch.stack(model.module(x)[2::2])


def _hardest(weights: Tensor, count: int) -> list[tuple[int, int, int]]:
    """`count` times (round, task, expert), the expert that comes least near to winning in the pool first."""
    experts = weights.shape[2]
    order = torch.argsort(weights.amax(dim=1).flatten(), stable=True).tolist()
    return [(turn // len(order), *divmod(order[turn % len(order)], experts)) for turn in range(count)]


def _ascend(model: ExportableModel, start: Tensor, pairs: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
    """Follow the gradient of each row's own log routing weight for a few steps, no further out than large
    rows.

    Rows that would make an output infinite stay where they began.
    """
    tasks = torch.tensor([task for task, _ in pairs])
    experts = torch.tensor([expert for _, expert in pairs])
    rows = torch.arange(len(pairs))
    step = _mean_size(start).clamp_min(1e-2)
    x = start
    for _ in range(_ASCENT_STEPS):
        x = x.detach().requires_grad_(True)
        weights = torch.stack(model.module(x)[2::2])  # (T, N, K)
        chosen = weights[tasks, rows, experts].clamp_min(1e-30).log().sum()
        (gradient,) = torch.autograd.grad(chosen, x)
        moved = x + step * gradient / _mean_size(gradient).clamp_min(1e-12)
        x = moved * (_LARGEST_SCALE / _mean_size(moved)).clamp_max(1.0)
    x = x.detach()
    return torch.where(_is_finite(model, x).unsqueeze(1), x, start).numpy()


def _mean_size(x: Tensor) -> Tensor:
    return x.abs().mean(dim=1, keepdim=True)


@torch.no_grad()
def _is_finite(model: ExportableModel, x: Tensor) -> Tensor:
    """(N,) whether every float32 output of a row is finite."""
    finite = torch.isfinite(x).all(dim=1)
    for output in model.module(x):
        finite &= torch.isfinite(output.flatten(1)).all(dim=1)
    return finite

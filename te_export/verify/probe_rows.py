"""Inputs that a parity check can trust: ordinary, large and tiny ones, and rows that make different experts
win.

A check on one ordinary input has been seen to pass graphs that had lost most of their experts: rows have to move
the routing. All rows follow from a fixed seed, the model, and the rows it is known to accept, if it came with some:
integers are drawn from those, or from all that the embedding they index has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from te_export.capture.joint_graph import routing_weights_name
from te_export.errors import GateError
from te_export.models.exportable import ExportableModel, ModelInput
from te_export.models.input_rows import InputRows, join_rows

__all__ = ["ORDINARY", "ProbeRows", "draw_rows", "make_probe_rows"]

ORDINARY = "ordinary"
_SEED = 20_240_229
_UNITS = 13
_ROWS = 40 * _UNITS
_FEWEST_ROWS = 20 * _UNITS
_FEWEST_ROWS_OF_CONVOLUTIONS = 5 * _UNITS
_ROWS_TIMES_BYTES = 5e10
"""Rows are fewer where running every graph over them would take minutes: bytes of weights read per row,
times rows.
"""
_LARGEST_SCALE = 100.0
_ASCENT_STEPS = 12


@dataclass(frozen=True)
class ProbeRows:
    """N rows in consecutive groups.

    Attributes:
        groups: (name, first row, row after the last) of each group, in order, without gaps.
    """

    x: InputRows
    groups: tuple[tuple[str, int, int], ...]

    def __len__(self) -> int:
        return len(self.x)


def make_probe_rows(model: ExportableModel) -> ProbeRows:
    """Make 260 to 520 rows for one model: 8/13 ordinary, 2/13 large, 1/13 tiny, 2/13 routing.

    There are fewer, from 65 on, where convolutions make a row dear. A model that reads no floats has no large or tiny
    rows, and one without a gate no routing rows.

    Raises:
        GateError: torch's own float32 outputs are not finite even on ordinary inputs.
    """
    unit = _row_count(model) // _UNITS
    rng = np.random.default_rng(_SEED)
    parts = [(ORDINARY, _finite(model, _ordinary(model, rng, 8 * unit)))]
    if any(spec.is_float for spec in model.inputs):
        parts.append(("large", _large(model, rng, 2 * unit)))
        parts.append(("tiny", _finite(model, _tiny(model, rng, unit))))
    if any(task.num_experts for task in model.tasks):
        parts.append(("routing", _routing(model, join_rows([rows for _, rows in parts]), 2 * unit)))
    ends = np.cumsum([len(rows) for _, rows in parts]).tolist()
    groups = tuple((name, end - len(rows), end) for (name, rows), end in zip(parts, ends, strict=True))
    return ProbeRows(x=join_rows([rows for _, rows in parts]), groups=groups)


def _row_count(model: ExportableModel) -> int:
    """Every task graph reads the whole trunk again, so rows get fewer with tasks as with size."""
    read_bytes = 2 * model.row_cost_bytes + len(model.tasks) * max(
        model.bytes_of(model.trunk_parameters), 4 * model.multiply_adds
    )
    fewest = _FEWEST_ROWS_OF_CONVOLUTIONS if model.multiply_adds else _FEWEST_ROWS
    return max(fewest, min(_ROWS, int(_ROWS_TIMES_BYTES / max(1, read_bytes))))


def _ordinary(model: ExportableModel, rng: np.random.Generator, rows: int) -> InputRows:
    """Floats half standard normal (standardized tables), half uniform in 0..1 (images); of a model that came with
    rows, half of the uniform ones are of those.
    """
    return draw_rows(model.inputs, rng, rows)


def draw_rows(inputs: Sequence[ModelInput], rng: np.random.Generator, rows: int) -> InputRows:
    """Ordinary rows for some inputs."""
    return InputRows({spec.name: _ordinary_values(spec, rng, rows) for spec in inputs})


def _ordinary_values(spec: ModelInput, rng: np.random.Generator, rows: int) -> NDArray[np.generic]:
    if not spec.is_float:
        return _whole_values(spec, rng, rows)
    half = rows // 2
    normal = rng.standard_normal((rows - half, *spec.shape), dtype=np.float32)
    values = np.concatenate([normal, rng.random((half, *spec.shape), dtype=np.float32)])
    if spec.examples is not None and len(spec.examples):
        known = half // 2
        values[rows - known :] = spec.examples[np.arange(known) % len(spec.examples)]
    return values


def _whole_values(spec: ModelInput, rng: np.random.Generator, rows: int) -> NDArray[np.generic]:
    """Integers and bools: any that the embedding they index holds, else each element one of its examples. A flag is true or
    false; several bools may be a mask, which has to leave something.
    """
    if spec.below is not None:
        return rng.integers(0, spec.below, (rows, *spec.shape)).astype(spec.dtype)
    if spec.dtype == "bool" and (spec.examples is None or not spec.shape):
        return rng.random((rows, *spec.shape)) < 0.5
    if spec.examples is None:
        raise ValueError(f"input {spec.name!r} holds integers and came without examples to draw from")
    flat = spec.examples.reshape(len(spec.examples), -1)
    chosen = rng.integers(0, len(flat), (rows, flat.shape[1]))
    return np.take_along_axis(flat, chosen, axis=0).reshape(rows, *spec.shape)


def _tiny(model: ExportableModel, rng: np.random.Generator, rows: int) -> InputRows:
    """Normal rows scaled by 1e-6 to 0.1, and one row of zeros."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for spec in model.inputs:
        if not spec.is_float:
            arrays[spec.name] = _whole_values(spec, rng, rows)
            continue
        tiny = rng.standard_normal((rows, *spec.shape)) * 10.0 ** rng.uniform(
            -6.0, -1.0, _columns(rows, spec)
        )
        tiny[0] = 0.0
        arrays[spec.name] = tiny.astype(np.float32)
    return InputRows(arrays)


def _columns(rows: int, spec: ModelInput) -> tuple[int, ...]:
    """The shape of one number per row that multiplies all of the row."""
    return (rows, *(1 for _ in spec.shape))


def _large(model: ExportableModel, rng: np.random.Generator, rows: int) -> InputRows:
    """Normal rows scaled by up to 100, less where torch's float32 outputs would overflow."""
    directions = {
        spec.name: rng.standard_normal((rows, *spec.shape)) for spec in model.inputs if spec.is_float
    }
    for largest in (_LARGEST_SCALE, 10.0, 1.0):
        arrays: dict[str, NDArray[np.generic]] = {}
        for spec in model.inputs:
            if spec.is_float:
                scale = largest ** rng.uniform(0.5, 1.0, _columns(rows, spec))
                arrays[spec.name] = (directions[spec.name] * scale).astype(np.float32)
            else:
                arrays[spec.name] = _whole_values(spec, rng, rows)
        large = InputRows(arrays)
        if bool(_is_finite(model, large.tensors()).all()):
            return large
    if all(spec.examples is None for spec in model.inputs):
        raise GateError(_OVERFLOWS.format("standard normal inputs"))
    return _finite(model, large)


_OVERFLOWS = (
    "torch's own float32 outputs are infinite or NaN on {}: this model overflows float32, so no export of it can be "
    "right. Check the checkpoint, or train with weight decay."
)


def _finite(model: ExportableModel, rows: InputRows) -> InputRows:
    """The rows, with known ones in place of those that a model which came with rows has no finite answer to.

    Raises:
        GateError: it has none to its own example rows.
    """
    if all(spec.examples is None for spec in model.inputs):
        return rows
    good = _is_finite(model, rows.tensors()).numpy()
    if good.all():
        return rows
    arrays = {name: array.copy() for name, array in rows.arrays.items()}
    for spec in model.inputs:
        known = spec.examples
        if known is None:  # one that was answered, or where none was, those drawn
            known = arrays[spec.name][good][:1] if good.any() else arrays[spec.name]
        arrays[spec.name][~good] = known[np.arange(int((~good).sum())) % len(known)]
    mended = InputRows(arrays)
    if not bool(_is_finite(model, mended.tensors()).all()):
        raise GateError(
            "torch's own float32 outputs are infinite or NaN on the example inputs, so there is nothing to prove an "
            "export by. Pass example inputs that the module answers with finite numbers, in eval mode."
        )
    return mended


def _routing(model: ExportableModel, pool: InputRows, rows: int) -> InputRows:
    """For a task and expert, the row of the pool that gives the expert most weight, pushed further along the
    gradient."""
    weights = _routing_weights(model, pool.tensors())
    chosen = _hardest(weights, rows)
    rounds = rows // sum(found.shape[1] for found in weights) + 1
    best = [found.topk(min(rounds, len(pool)), dim=0).indices for found in weights]  # (rounds, K) row indices
    starts = [int(best[task][turn % len(best[task]), expert]) for turn, task, expert in chosen]
    start = pool[starts]
    return (
        _ascend(model, start, [(task, expert) for _, task, expert in chosen]) if start.has_floats else start
    )


def _gates(model: ExportableModel) -> list[int]:
    """Where the module's outputs have the routing weights of each task that has a gate."""
    names = model.output_names
    return [names.index(routing_weights_name(task.name)) for task in model.tasks if task.num_experts]


@torch.no_grad()
def _routing_weights(model: ExportableModel, x: Sequence[Tensor]) -> list[Tensor]:
    """(N, K) of each task that has a gate."""
    outputs = model.module(*x)
    return [outputs[index] for index in _gates(model)]


def _hardest(weights: Sequence[Tensor], count: int) -> list[tuple[int, int, int]]:
    """`count` times (round, task, expert), the expert that comes least near to winning in the pool first."""
    pairs = [(task, expert) for task, found in enumerate(weights) for expert in range(found.shape[1])]
    largest = torch.cat([found.amax(dim=0) for found in weights])
    order = torch.argsort(largest, stable=True).tolist()
    return [(turn // len(order), *pairs[order[turn % len(order)]]) for turn in range(count)]


def _ascend(model: ExportableModel, start: InputRows, pairs: Sequence[tuple[int, int]]) -> InputRows:
    """Follow the gradient of each row's own log routing weight for a few steps, no further out than large
    rows.

    Rows that would make an output infinite stay where they began.
    """
    places = [_gates(model)[task] for task, _ in pairs]
    x = list(start.tensors())
    floats = [index for index, tensor in enumerate(x) if tensor.is_floating_point()]
    steps = [_mean_size(x[index]).clamp_min(1e-2) for index in floats]
    for _ in range(_ASCENT_STEPS):
        leaves = [x[index].detach().requires_grad_(True) for index in floats]
        for index, leaf in zip(floats, leaves, strict=True):
            x[index] = leaf
        outputs = model.module(*x)
        weights = torch.stack(
            [
                outputs[place][row, expert]
                for row, (place, (_, expert)) in enumerate(zip(places, pairs, strict=True))
            ]
        )
        if not weights.requires_grad:  # the gates read integers alone
            break
        chosen = weights.clamp_min(1e-30).log().sum()
        gradients = torch.autograd.grad(chosen, leaves, allow_unused=True)
        for index, leaf, gradient, step in zip(floats, leaves, gradients, steps, strict=True):
            if gradient is not None:
                moved = leaf + step * gradient / _mean_size(gradient).clamp_min(1e-12)
                x[index] = moved * (_LARGEST_SCALE / _mean_size(moved)).clamp_max(1.0)
    x = [tensor.detach() for tensor in x]
    finite = _is_finite(model, x)
    arrays = {}
    for name, moved, begun in zip(start.arrays, x, start.tensors(), strict=True):
        keep = finite.reshape(-1, *(1 for _ in begun.shape[1:]))
        arrays[name] = torch.where(keep, moved, begun).numpy()
    return InputRows(arrays)


def _mean_size(x: Tensor) -> Tensor:
    """(N, 1, …) the mean magnitude of each row."""
    return x.abs().reshape(len(x), -1).mean(dim=1).reshape(-1, *(1 for _ in x.shape[1:]))


@torch.no_grad()
def _is_finite(model: ExportableModel, x: Sequence[Tensor]) -> Tensor:
    """(N,) whether every float32 output of a row is finite."""
    finite = torch.ones(len(x[0]), dtype=torch.bool)
    for values in (*x, *model.module(*x)):
        finite &= torch.isfinite(values.reshape(len(values), -1)).all(dim=1)
    return finite

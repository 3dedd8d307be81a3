"""The golden rows of a bundle: inputs, what the float64 oracle gave for them, and the error allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from te_runtime.bundle import Bundle
from te_runtime.errors import BundleError, InputError
from te_runtime.manifest import Manifest, OutputParity, TaskParity, TensorSpec, Variant
from te_runtime.npz import ArraySpec, read_npz

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MAX_GOLDEN_BYTES", "GoldenRows", "read_golden_rows", "take_rows"]

MAX_GOLDEN_BYTES = 2**30


@dataclass(frozen=True)
class GoldenRows:
    """Golden rows, read and checked.

    Attributes:
        inputs: input name → array of R rows in the input's dtype.
        oracle: (task, output) → float64 array of R rows, all finite; output is `prediction` or
            `routing_weights`.
        bounds: (task, output) → float64 (R,), the largest absolute error allowed in each row.
        pruned_bounds: the same for the pruned graphs, of tasks that have one.
        group_starts: the first row of each group.
        rows: R.
    """

    inputs: Mapping[str, NDArray[np.generic]]
    oracle: Mapping[tuple[str, str], NDArray[np.float64]]
    bounds: Mapping[tuple[str, str], NDArray[np.float64]]
    pruned_bounds: Mapping[tuple[str, str], NDArray[np.float64]]
    group_starts: tuple[int, ...]
    rows: int


def read_golden_rows(bundle: Bundle, variant: Variant) -> GoldenRows:
    """Read a bundle's golden rows with the bounds of one variant.

    Raises:
        BundleError: an array is missing, of another shape or dtype, too large, or not finite, or a group of
            rows has no bound.
    """
    manifest = bundle.manifest
    lengths = [group.rows for group in manifest.golden.groups]
    rows = sum(lengths)
    if rows == 0:
        raise BundleError(f"{bundle.root}: the manifest names no golden rows, so nothing can be verified")
    path = Path(bundle.path(manifest.golden.path))
    try:
        arrays = read_npz(path, _wanted(manifest, rows), limit_bytes=MAX_GOLDEN_BYTES)
    except InputError as error:
        raise BundleError(f"{error}. Copy the bundle again whole, or export the model again.") from error
    oracle = {}
    for key, name, _ in _outputs(manifest, variant.parity):
        values = arrays[name].astype(np.float64)
        if not np.isfinite(values).all():
            raise BundleError(f"{path}: {name!r} holds a value that is not finite. Export the model again.")
        oracle[key] = values
    bounds = _bounds(manifest, variant.parity, variant.precision)
    pruned = [task.pruned.parity for task in variant.tasks if task.pruned is not None]
    pruned_bounds = _bounds(manifest, pruned, f"{variant.precision} pruned")
    inputs = {spec.name: arrays[f"input.{spec.name}"] for spec in manifest.inputs}
    starts = tuple(int(end) - length for end, length in zip(np.cumsum(lengths), lengths, strict=True))
    return GoldenRows(inputs, oracle, bounds, pruned_bounds, starts, rows)


def take_rows(golden: GoldenRows, rows: NDArray[np.intp] | slice) -> dict[str, NDArray[np.generic]]:
    """The inputs of some rows, as feeds."""
    return {name: array[rows] for name, array in golden.inputs.items()}


def _bounds(
    manifest: Manifest, parities: Sequence[TaskParity], where: str
) -> dict[tuple[str, str], NDArray[np.float64]]:
    lengths = [group.rows for group in manifest.golden.groups]
    return {
        key: np.repeat(_group_bounds(manifest, parity, f"{where} {name}"), lengths)
        for key, name, parity in _outputs(manifest, parities)
    }


def _outputs(
    manifest: Manifest, parities: Sequence[TaskParity]
) -> list[tuple[tuple[str, str], str, OutputParity]]:
    """Each output as (task, output), its name in golden.npz, and its parity figures."""
    tasks = {task.name: task for task in manifest.tasks}
    outputs = []
    for parity in parities:
        task = tasks[parity.task]
        outputs.append(((task.name, "prediction"), f"{task.name}.prediction", parity.prediction))
        if task.routing_weights is not None:
            weights = _routing_parity(parity)
            outputs.append(((task.name, "routing_weights"), f"{task.name}.routing_weights", weights))
    return outputs


def _routing_parity(parity: TaskParity) -> OutputParity:
    if parity.routing_weights is None:
        raise BundleError(
            f"manifest: task {parity.task!r} has routing weights but no parity figures for them"
        )
    return parity.routing_weights


def _group_bounds(manifest: Manifest, parity: OutputParity, where: str) -> Sequence[float]:
    by_group = {group.group: group.bound for group in parity.groups}
    bounds = []
    for group in manifest.golden.groups:
        if group.name not in by_group:
            raise BundleError(f"manifest: parity of {where} has no bound for the golden rows {group.name!r}")
        bounds.append(by_group[group.name])
    return bounds


def _wanted(manifest: Manifest, rows: int) -> dict[str, ArraySpec]:
    wanted = {f"input.{spec.name}": _array_spec(spec, rows, spec.dtype) for spec in manifest.inputs}
    for task in manifest.tasks:
        wanted[f"{task.name}.prediction"] = _array_spec(task.prediction, rows, "float64")
        if task.routing_weights is not None:
            wanted[f"{task.name}.routing_weights"] = _array_spec(task.routing_weights, rows, "float64")
    return wanted


def _array_spec(spec: TensorSpec, rows: int, dtype: str) -> ArraySpec:
    """What golden.npz must hold: `rows` for the batch axis, and any length for another open axis."""
    shape = (rows, *(axis if isinstance(axis, int) else None for axis in spec.shape[1:]))
    return ArraySpec(shape, dtype)

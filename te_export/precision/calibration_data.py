"""Reads the rows that choose quantization ranges and judge the result: an .npz file of the user's own data.

    <input name>    (N, input_dim), at least 32 rows, no NaN or infinity
    labels.<task>   for any of the exported tasks, the true answers of the same rows

x is cast to float32 by the rule of te_runtime.inputs: floats of any width and integers, rounded to the nearest
float32; a value that float32 cannot hold is refused, and so are bools, complex numbers, text and dates.

Rows with an even index calibrate and rows with an odd index judge, so that nothing is judged on what it was
calibrated with. Rows in an order that alternates, such as classes in turn, are to be shuffled first: the halves
would differ.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from te_export.errors import UsageError
from te_export.models.exportable import ExportableModel, TaskOutput
from te_export.models.input_rows import InputRows
from te_runtime.errors import InputError
from te_runtime.inputs import prepare_inputs, shown_shape
from te_runtime.interfaces import BATCH_AXIS
from te_runtime.manifest import TensorSpec
from te_runtime.npz import read_npz

__all__ = ["FEWEST_ROWS", "LARGEST_BYTES", "CalibrationData", "Labels", "read_calibration_data"]

FEWEST_ROWS = 32
LARGEST_BYTES = 4 * 2**30
"""What the arrays of a file may take together once they are unpacked."""

Labels = NDArray[np.int64] | NDArray[np.float64]
"""Classes (N,) int64 of a task with several outputs, or values (N, out) float64."""

_LABELS = "labels."
_SHOWN_NAMES = 20


@dataclass(frozen=True)
class CalibrationData:
    """Rows of the user's own data, and their labels where there are any.

    Attributes:
        x: N rows, finite.
        labels: by task name; classes (N,) int64 in 0..out-1 for a task with several outputs, else values
            (N, out) float64. Tasks without labels are missing.
    """

    x: InputRows
    labels: Mapping[str, Labels]

    @property
    def calibration_rows(self) -> InputRows:
        """Rows 0, 2, 4, …"""
        return self.x[0::2]

    @property
    def judged_rows(self) -> InputRows:
        """Rows 1, 3, 5, …"""
        return self.x[1::2]

    @property
    def judged_labels(self) -> dict[str, Labels]:
        """The labels of `judged_rows`, by task name."""
        return {task: labels[1::2] for task, labels in self.labels.items()}


def read_calibration_data(path: str | os.PathLike[str], model: ExportableModel) -> CalibrationData:
    """Read rows and labels for a model.

    Args:
        path: an .npz file of plain numbers, of at most 4 GiB once unpacked. For a task with one output, labels
            are (N,) or (N, 1) values, or 0 and 1 where it tells two classes apart; for one with more, (N,) or
            (N, 1) classes, counted from 0 and whole in any dtype, or (N, out) values.

    Raises:
        UsageError: the file is missing, damaged or too large; an array is missing, unknown, of another shape or
            dtype, too short, or not finite; or labels cannot judge: one class alone, or values all alike.
    """
    source = Path(path)
    arrays = _read_arrays(source, model)
    try:
        _check_names(arrays, model)
        x = _rows(arrays, model)
        labels = {
            task.name: _labels(arrays[_LABELS + task.name], task, rows=len(x))
            for task in model.tasks
            if _LABELS + task.name in arrays
        }
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error
    except MemoryError as error:
        raise UsageError(f"{source}: memory ran out while it was read: pass fewer rows") from error
    return CalibrationData(x=x, labels=labels)


def _read_arrays(source: Path, model: ExportableModel) -> dict[str, NDArray[np.generic]]:
    fix = (
        f"Write it with numpy.savez(file, {_assignments(model)}): plain numbers, at most {LARGEST_BYTES >> 30} GiB "
        "in all; a few thousand rows are plenty."
    )
    if os.path.isdir(source):  # noqa: PTH112 - unlike Path.is_dir, it raises for no name whatever
        raise UsageError(f"{source}: is a folder, expected an .npz file. {fix}")
    if not os.path.isfile(source):  # noqa: PTH113 - as above; a pipe would be waited for without end
        raise UsageError(f"{source}: no such file, expected an .npz file. {fix}")
    try:
        return read_npz(source, limit_bytes=LARGEST_BYTES)
    except InputError as error:
        raise UsageError(f"{str(error).rstrip('.')}. {fix}") from error


def _check_names(arrays: Mapping[str, object], model: ExportableModel) -> None:
    names = [spec.name for spec in model.inputs]
    allowed = [*names, *(_LABELS + task for task in model.task_names)]
    findings = [f"array {name!r} is missing" for name in names if name not in arrays]
    for name in (name for name in arrays if name not in allowed):
        near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
        findings.append(f"array {name!r:.90} is unknown" + (f" (did you mean {near[0]!r}?)" if near else ""))
    if findings:
        more = f", … ({len(model.tasks)} tasks in all)" if len(allowed) > _SHOWN_NAMES else ""
        raise UsageError(
            f"{'; '.join(findings[:3])}. Expected {', '.join(map(repr, names[:_SHOWN_NAMES]))} for the rows, and "
            f"for labels any of {', '.join(allowed[len(names) : len(names) + _SHOWN_NAMES - 1])}{more}: rename the "
            "arrays, or leave them out."
        )


def _assignments(model: ExportableModel) -> str:
    """How the arrays of the inputs are named in a call of numpy.savez."""
    if len(model.inputs) == 1:
        return f"{model.inputs[0].name}=rows"
    return "**{" + ", ".join(f"{spec.name!r}: …" for spec in model.inputs[:_SHOWN_NAMES]) + "}"


def _stored(model: ExportableModel) -> str:
    """The dtype and shape of the array of each input."""
    several = len(model.inputs) > 1
    return ", ".join(
        f"{spec.name!r} as " * several + f"{spec.dtype} of shape {shown_shape(('rows', *spec.shape))}"
        for spec in model.inputs[:_SHOWN_NAMES]
    )


def _rows(arrays: Mapping[str, NDArray[np.generic]], model: ExportableModel) -> InputRows:
    specs = [TensorSpec(spec.name, spec.dtype, (BATCH_AXIS, *spec.shape)) for spec in model.inputs]
    try:
        feeds, rows = prepare_inputs({spec.name: arrays[spec.name] for spec in specs}, specs)
    except InputError as error:
        raise UsageError(
            f"{error}. Store the rows as the model was trained on them, {_stored(model)}"
        ) from error
    first = specs[0].name
    if rows < FEWEST_ROWS:
        raise UsageError(
            f"array {first!r}: got {rows} rows, expected at least {FEWEST_ROWS}: half of them calibrate and "
            "half judge; pass some hundred or more"
        )
    for name, array in feeds.items():
        _check_finite(array, name)
    return InputRows(feeds)


def _labels(array: NDArray[np.generic], task: TaskOutput, *, rows: int) -> Labels:
    name = _LABELS + task.name
    if array.dtype.kind not in "fiub":
        raise UsageError(f"array {name!r}: got {array.dtype}, expected integers or floats")
    if len(task.output_shape) > 1:
        raise UsageError(
            f"array {name!r}: a row of this task's prediction has shape {shown_shape(task.output_shape)}, and labels are "
            "judged for one row of numbers alone: leave the array out, and the task is held against the oracle"
        )
    _check_label_shape(array, task, rows=rows)
    with np.errstate(over="ignore"):  # what a float64 cannot hold becomes infinite, and is refused as such
        values = array.reshape(rows, -1).astype(np.float64)
    _check_finite(values, name)
    if task.output_dim >= 2 and values.shape[1] == 1:
        return _classes(values[:, 0], name, task.output_dim)
    _check_values(values, name)
    return values


def _check_label_shape(array: NDArray[np.generic], task: TaskOutput, *, rows: int) -> None:
    name, found = _LABELS + task.name, array.shape
    expected = dict.fromkeys([(rows,), (rows, 1), (rows, task.output_dim)])
    if found in expected:
        return
    if found[1:] in {shape[1:] for shape in expected} and found:
        raise UsageError(
            f"array {name!r}: got labels of {found[0]} rows, expected {rows}, one for each row of the input"
        )
    wanted = [shown_shape(shape) for shape in expected]
    raise UsageError(
        f"array {name!r}: got shape {shown_shape(found)}, expected {', '.join(wanted[:-1])} or {wanted[-1]}"
    )


def _classes(values: NDArray[np.float64], name: str, count: int) -> NDArray[np.int64]:
    wrong = (values != np.floor(values)) | (values < 0) | (values > count - 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise UsageError(
            f"array {name!r}: got {values[row]:g} in row {row}, expected whole classes from 0 to {count - 1}, for "
            f"the task has {count} outputs: count classes from 0, or pass values of shape (rows, {count})"
        )
    return values.astype(np.int64)


def _check_values(values: NDArray[np.float64], name: str) -> None:
    """Whether values can judge: in range, and different enough in the rows that do."""
    largest = float(np.finfo(np.float32).max)
    too_large = np.abs(values).max(axis=1) > largest
    if too_large.any():
        row = int(too_large.argmax())
        raise UsageError(
            f"array {name!r}: row {row} is too large for float32, expected at most {largest:.6g}"
        )
    is_binary = _is_binary(values)
    if is_binary and values.shape[1] > 1:
        raise UsageError(
            f"array {name!r}: got only 0 and 1 in shape {shown_shape(values.shape)}, expected classes or measured "
            "values: for one-hot labels pass labels.argmax(axis=1), for anything else leave the array out"
        )
    judged = values[1::2]
    spread = judged.max(axis=0) - judged.min(axis=0)
    if np.square(spread).sum() < np.finfo(np.float64).tiny:  # so small that no variance is left
        what = "both 0 and 1" if is_binary else "values that differ"
        raise UsageError(
            f"array {name!r}: is {', '.join(f'{value:g}' for value in judged[0][:4])} in every row with an odd "
            f"index, and those judge; expected {what} there: shuffle the rows, or leave the array out"
        )


def _is_binary(values: NDArray[np.float64]) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _check_finite(array: NDArray[np.generic], name: str) -> None:
    if array.dtype.kind != "f":
        return
    finite = np.isfinite(array)
    if finite.all():
        return
    row, *columns = np.argwhere(~finite)[0].tolist()
    place = f"row {row}" + (f", column {', '.join(map(str, columns))}" if columns else "")
    raise UsageError(
        f"array {name!r}: {int((~finite).sum())} of {array.size} values are NaN or infinite, the first "
        f"({array[(row, *columns)]}) in {place}, counted from 0: leave such rows out"
    )

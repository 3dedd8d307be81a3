"""Checks what a caller passes to predict, and casts it to what the graphs read.

Casting keeps the value's kind: a float input takes floats of any width and integers, rounded to the nearest
value it can hold; an integer input takes integers that fit; a bool input takes bools. Complex numbers, text,
dates and objects are refused, and so is a number that the input's dtype cannot hold. NaN and infinities pass
unless `on_nonfinite="error"` was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np

from te_runtime.choices import parse_choice
from te_runtime.errors import InputError
from te_runtime.interfaces import BATCH_AXIS
from te_runtime.manifest import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["InputReader", "OnNonfinite", "parse_on_nonfinite", "prepare_inputs", "shown_shape"]

OnNonfinite = Literal["pass", "error"]

_KIND_NAMES = {"f": "floats or integers", "i": "integers", "u": "integers", "b": "bools"}
_KINDS_TAKEN = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}


class InputReader:
    """Checks and casts what callers pass to predict; the plain case, one array that fits, takes below 1 µs."""

    __slots__ = ("_axes", "_dtype", "_name", "_ndim", "_refuses_nonfinite", "_specs")

    def __init__(self, specs: Sequence[TensorSpec], on_nonfinite: OnNonfinite = "pass") -> None:
        """Make a reader.

        Args:
            specs: the model's inputs.
            on_nonfinite: what to do about NaN and infinities.
        """
        self._specs = tuple(specs)
        self._refuses_nonfinite = on_nonfinite == "error"
        spec = self._specs[0]
        is_plain = len(self._specs) == 1 and spec.dtype != "bfloat16"
        self._name = spec.name
        self._ndim = len(spec.shape)
        self._axes = spec.shape[1:]  # an open axis is a string and equals no length
        self._dtype = np.dtype(spec.dtype) if is_plain else None

    def read(
        self, x: NDArray[np.generic] | Mapping[str, NDArray[np.generic]]
    ) -> tuple[dict[str, NDArray[np.generic]], int]:
        """As prepare_inputs for this reader's inputs.

        Raises:
            InputError: as prepare_inputs, or a value is not finite and that was to be an error.
        """
        if (
            type(x) is np.ndarray
            and x.dtype is self._dtype
            and x.ndim == self._ndim
            and x.shape[1:] == self._axes
            and (flags := x.flags).c_contiguous
            and flags.aligned
        ):
            feeds, rows = {self._name: x}, len(x)
        else:
            feeds, rows = prepare_inputs(x, self._specs)
        if self._refuses_nonfinite:
            for name, array in feeds.items():
                _check_finite(array, name)
        return feeds, rows


def parse_on_nonfinite(value: str) -> OnNonfinite:
    """What a caller wants done about NaN and infinities.

    Raises:
        InputError: it is neither `pass` nor `error`.
    """
    return cast(OnNonfinite, parse_choice("on_nonfinite", value, get_args(OnNonfinite)))


def prepare_inputs(
    x: NDArray[np.generic] | Mapping[str, NDArray[np.generic]], specs: Sequence[TensorSpec]
) -> tuple[dict[str, NDArray[np.generic]], int]:
    """Turn what the caller passed into feeds for a session.

    Args:
        x: one array where the model has one input, or a mapping from every input's name to its array.
        specs: the model's inputs.

    Returns:
        The arrays by name, C-contiguous and of the inputs' dtypes, and the number of rows B.

    Raises:
        InputError: a name, dtype, shape or value does not fit.
    """
    arrays = x if isinstance(x, Mapping) else _single(x, specs)
    _check_names(arrays, specs)
    axes: dict[str, tuple[int, str]] = {}
    feeds: dict[str, NDArray[np.generic]] = {}
    for spec in specs:
        array = _plain_array(arrays[spec.name], spec)
        _check_shape(array, spec)
        _bind_axes(array, spec, axes)
        feeds[spec.name] = _cast(array, spec)
    return feeds, axes[BATCH_AXIS][0]


def shown_shape(shape: Sequence[int | str]) -> str:
    """A shape as Python would write it, without quotes around names: `(batch, 784)`."""
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _single(x: NDArray[np.generic], specs: Sequence[TensorSpec]) -> dict[str, NDArray[np.generic]]:
    if len(specs) != 1:
        names = ", ".join(spec.name for spec in specs)
        raise InputError(
            f"the model has {len(specs)} inputs ({names}): pass a dict from each name to its array"
        )
    return {specs[0].name: x}


def _check_names(arrays: Mapping[str, NDArray[np.generic]], specs: Sequence[TensorSpec]) -> None:
    expected = [spec.name for spec in specs]
    missing = [name for name in expected if name not in arrays]
    extra = [str(name) for name in arrays if name not in expected]
    if not missing and not extra:
        return
    findings = []
    if missing:
        findings.append(f"missing {', '.join(missing)}")
    if extra:
        findings.append(f"unknown {', '.join(extra):.200}")
    raise InputError(f"inputs: {'; '.join(findings)}; expected exactly {', '.join(expected)}")


def _plain_array(array: object, spec: TensorSpec) -> NDArray[np.generic]:
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(f"input {spec.name!r}: masked values would be lost; pass x.filled(value)")
    if not isinstance(array, np.ndarray):
        kind = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
        raise InputError(
            f"input {spec.name!r}: got {kind}, expected a numpy array: pass numpy.asarray(x, {spec.dtype!r})"
        )
    return np.asarray(array)


def _check_shape(array: NDArray[np.generic], spec: TensorSpec) -> None:
    found, expected = array.shape, spec.shape
    if len(found) == len(expected) and all(
        isinstance(wanted, str) or axis == wanted for axis, wanted in zip(found, expected, strict=True)
    ):
        return
    message = f"input {spec.name!r}: got shape {shown_shape(found)}, expected {shown_shape(expected)}"
    if len(found) == len(expected) - 1:
        message += ": for one row pass x[None]" if len(found) == 0 else ": for one row pass x[None, :]"
    raise InputError(message)


def _bind_axes(array: NDArray[np.generic], spec: TensorSpec, axes: dict[str, tuple[int, str]]) -> None:
    """An axis of one name has one length, in every input."""
    for length, name in zip(array.shape, spec.shape, strict=True):
        if not isinstance(name, str):
            continue
        bound, first = axes.setdefault(name, (length, spec.name))
        if bound != length:
            raise InputError(
                f"axis {name!r} is {bound} in input {first!r} and {length} in input {spec.name!r}"
            )
        if length == 0 and name != BATCH_AXIS:
            raise InputError(f"input {spec.name!r}: axis {name!r} is empty")


def _cast(array: NDArray[np.generic], spec: TensorSpec) -> NDArray[np.generic]:
    if spec.dtype == "bfloat16":
        raise InputError(f"input {spec.name!r} is bfloat16, which this release of te_runtime cannot feed")
    target = np.dtype(spec.dtype)
    if array.dtype == target:
        return np.require(array, requirements=["C", "A"])
    if array.dtype.kind not in _KINDS_TAKEN[target.kind]:
        raise InputError(
            f"input {spec.name!r}: got {array.dtype.name}, expected {_KIND_NAMES[target.kind]} ({spec.dtype})"
        )
    if target.kind in "iu":
        _check_integers_fit(array, target, spec)
    try:
        with np.errstate(over="raise"):
            return array.astype(target, order="C")
    except FloatingPointError as error:
        raise InputError(
            f"input {spec.name!r}: a {array.dtype.name} value is too large for {spec.dtype}"
        ) from error


def _check_finite(array: NDArray[np.generic], name: str) -> None:
    if array.dtype.kind != "f":
        return
    finite = np.isfinite(array)
    if finite.all():
        return
    first = np.argwhere(~finite)[0].tolist()
    place = f"row {first[0]}" + (f", column {', '.join(map(str, first[1:]))}" if len(first) > 1 else "")
    raise InputError(
        f"input {name!r}: {int((~finite).sum())} of {array.size} values are NaN or infinite, the first "
        f"({array[tuple(first)]}) at {place}, counted from 0; expected finite values: clean the rows, or load "
        "the model with on_nonfinite='pass'"
    )


def _check_integers_fit(array: NDArray[np.generic], target: np.dtype[np.generic], spec: TensorSpec) -> None:
    if array.size == 0:
        return
    limits = np.iinfo(target.name)
    low, high = int(array.min()), int(array.max())
    if low < limits.min or high > limits.max:
        raise InputError(f"input {spec.name!r}: values from {low} to {high} do not fit {spec.dtype}")

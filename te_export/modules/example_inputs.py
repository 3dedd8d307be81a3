"""Rows that a module is known to accept, and how its forward takes them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from te_export.errors import UsageError
from te_export.models.input_rows import InputRows
from te_runtime.errors import InputError
from te_runtime.manifest import DType
from te_runtime.npz import read_npz

__all__ = ["Example", "ExampleInputs", "input_dtype", "read_example_inputs"]

Array = Tensor | NDArray[np.generic]
Example = Array | Mapping[str, Array] | Sequence[Array] | str | os.PathLike[str]
"""One tensor, a dict of named ones, several in the order of forward's parameters, or an .npz file of them: of one array
for forward(x), whatever its name."""

_LARGEST_BYTES = 2**32
_ONE_VALUE = (
    "If it tells forward which task to answer, leave it out and name the tasks with --task-names a,b,c (in Python "
    "task_names=...): every task is asked for. Anything else that is the same for all rows belongs into the module"
)
_DTYPES = frozenset({"float32", "int64", "int32", "int8", "uint8", "bool"})


@dataclass(frozen=True)
class ExampleInputs:
    """Example rows.

    Attributes:
        style: `positional`: forward(a, b); `mapping`: forward({"a": a, "b": b}); `keywords`: forward(a=a, b=b).
        rows: floats as float32, whole numbers of 8, 32 and 64 bits, and bools.
        leading: how many parameters of forward the inputs take.
        notes: what was cast.
    """

    style: Literal["positional", "mapping", "keywords"]
    rows: InputRows
    notes: tuple[str, ...]

    @property
    def leading(self) -> int:
        return 1 if self.style == "mapping" else len(self.rows.arrays)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.rows.arrays)

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[object, ...], dict[str, object]]:
        """The positional and the keyword arguments of forward for one tensor per input."""
        if self.style == "positional":
            return tuple(tensors), {}
        named = dict(zip(self.names, tensors, strict=True))
        return ((named,), {}) if self.style == "mapping" else ((), dict(named))


def read_example_inputs(example: Example, module: nn.Module) -> ExampleInputs:
    """Take example inputs in whatever form they came.

    Raises:
        UsageError: an input is no array of numbers, has no rows or another number of rows than the others, or the
            file cannot be read.
    """
    parameters, named = _forward_parameters(module)
    if isinstance(example, str | os.PathLike):
        arrays = _read_file(Path(example))
        is_first = len(arrays) == 1 and not {*arrays} & {*parameters[1:]}
        example = next(iter(arrays.values())) if is_first else arrays
    if isinstance(example, Mapping):
        given: dict[str, object] = {str(name): array for name, array in example.items()}
        if len(given) == 1 and len(parameters) == 1 and list(given) == parameters:
            style: Literal["positional", "mapping", "keywords"] = "positional"
        else:
            style = "keywords" if given and _are_keywords(module, given, named) else "mapping"
    else:
        several: list[object] = [*example] if isinstance(example, tuple | list) else [example]
        names = [
            *parameters[: len(several)],
            *(f"input_{index}" for index in range(len(parameters), len(several))),
        ]
        given, style = dict(zip(names, several, strict=True)), "positional"
    return _checked(given, style)


def input_dtype(array: NDArray[np.generic]) -> DType:
    """The dtype of an input as the manifest names it."""
    name = array.dtype.name
    assert name in get_args(DType)  # _plain casts to those in _DTYPES
    return cast(DType, name)


def _forward_parameters(module: nn.Module) -> tuple[list[str], list[str]]:
    """The parameters of forward that may be given by place, and those that may be given by name."""
    found = inspect.signature(module.forward).parameters.values()
    placed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return (
        [parameter.name for parameter in found if parameter.kind in placed],
        [parameter.name for parameter in found if parameter.kind in named],
    )


def _are_keywords(module: nn.Module, given: Mapping[str, object], named: Sequence[str]) -> bool:
    """Whether forward takes those names: as parameters of its own, or in **features once its own are given."""
    found = list(inspect.signature(module.forward).parameters.values())
    kinds = {parameter.kind for parameter in found}
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds
    needed = {parameter.name for parameter in found if parameter.default is inspect.Parameter.empty}
    return set(given) <= set(named) or (takes_any and needed & {*named} <= set(given))


def _read_file(path: Path) -> dict[str, NDArray[np.generic]]:
    fix = "Write it with numpy.savez(file, name=rows, …), an array for each input of the module's forward."
    if not os.path.isfile(path):  # noqa: PTH113 - unlike Path.is_file, it raises for no name whatever
        raise UsageError(f"{path}: no such file, expected an .npz file of example inputs. {fix}")
    try:
        return read_npz(path, limit_bytes=_LARGEST_BYTES)
    except InputError as error:
        raise UsageError(f"{str(error).rstrip('.')}. {fix}") from error


def _checked(
    given: Mapping[str, object], style: Literal["positional", "mapping", "keywords"]
) -> ExampleInputs:
    if not given:
        raise UsageError(
            "example inputs: got none, expected at least one array: what the module's forward takes"
        )
    notes: list[str] = []
    arrays = {name: _plain(name, array, notes) for name, array in given.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        found = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise UsageError(
            f"example inputs have different numbers of rows ({found:.300}): the first axis of every input must be the "
            "batch"
        )
    if not next(iter(lengths.values())):
        raise UsageError("example inputs have no rows: pass at least one")
    return ExampleInputs(style, InputRows(arrays), tuple(notes))


def _plain(name: str, array: object, notes: list[str]) -> NDArray[np.generic]:
    values, dtype = _as_array(name, array)
    if values.ndim == 0:
        raise UsageError(f"example input {name!r}: has no axes, expected the batch axis first. {_ONE_VALUE}")
    if values.dtype.kind not in "fiub":
        raise UsageError(f"example input {name!r}: got {values.dtype}, expected numbers or bools")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UsageError(f"example input {name!r}: holds NaN or infinity; pass rows that the module answers")
    if dtype in _DTYPES:
        return np.array(values, order="C")
    target = np.dtype(np.float32 if values.dtype.kind == "f" else np.int64)
    largest = float(np.finfo(np.float32).max) if values.dtype.kind == "f" else np.iinfo(np.int64).max
    if values.size and max(values.max().item(), -values.min().item()) > largest:
        raise UsageError(
            f"example input {name!r}: holds numbers that {target.name}, which it is taken as, cannot hold; pass rows that "
            "the module answers"
        )
    if dtype != "float64":
        notes.append(f"input {name!r} is taken as {target.name}; the example is {dtype}")
    return np.array(values, target, order="C")


def _as_array(name: str, array: object) -> tuple[NDArray[np.generic], str]:
    """As numpy holds it, and the name of the dtype it came in."""
    if isinstance(array, np.ndarray):
        return array, array.dtype.name
    if isinstance(array, bool | int | float | str | np.generic):
        raise UsageError(
            f"example input {name!r}: got the {type(array).__name__} {array!r:.40}, expected an array with the batch axis "
            f"first. {_ONE_VALUE}"
        )
    if not isinstance(array, Tensor):
        raise UsageError(
            f"example input {name!r}: got {type(array).__qualname__}, expected a tensor or a numpy array: pass "
            "torch.as_tensor(value)"
        )
    if array.layout != torch.strided or array.is_quantized:
        raise UsageError(
            f"example input {name!r}: got a sparse or quantized tensor, expected a dense one: pass x.to_dense() or "
            "x.dequantize()"
        )
    found = array.detach().cpu().resolve_conj().resolve_neg()
    values = (found.float() if found.dtype == torch.bfloat16 else found).numpy()
    return values, str(found.dtype).removeprefix("torch.")

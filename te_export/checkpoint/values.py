"""What a value found in a checkpoint can be, whichever container it came from.

A container supplies an `OpenValue`: it opens one level of a value, so that only what is asked for
is looked at. Opening a value takes time in proportion to its own length, however many others refer to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = [
    "Module",
    "ModuleContents",
    "OpenValue",
    "Other",
    "Record",
    "Scalar",
    "Sequence",
    "Table",
    "TensorValue",
    "Value",
]


@dataclass(frozen=True)
class Table:
    """A dict; its values are not opened yet."""

    items: Mapping[object, object]


@dataclass(frozen=True)
class Record:
    """A dataclass or namespace: attribute names and values that are not opened yet."""

    class_name: str
    fields: Mapping[str, object]


@dataclass(frozen=True)
class ModuleContents:
    """A whole torch module taken apart, freed of DataParallel and its like.

    Attributes:
        class_name: of the module.
        state: what its state_dict() would hold; the values are not opened yet.
        layer_types: path of each submodule to its class name; the module itself has the empty path.
        attributes: the module's own attributes, not opened yet.
        notes: what a person may want to know of it.
    """

    class_name: str
    state: Mapping[str, object]
    layer_types: Mapping[str, str]
    attributes: Mapping[str, object]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Module:
    """A whole torch module; `read` takes it apart, or raises CheckpointError."""

    class_name: str
    read: Callable[[], ModuleContents]


@dataclass(frozen=True)
class TensorValue:
    """A tensor; `load` gives it on the CPU, or raises CheckpointError."""

    load: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Scalar:
    """A single plain value."""

    value: bool | int | float | str | None


@dataclass(frozen=True)
class Sequence:
    """A list or tuple; its values are not opened yet."""

    values: tuple[object, ...]


@dataclass(frozen=True)
class Other:
    """Anything else."""

    description: str


Value = Table | Record | Module | TensorValue | Scalar | Sequence | Other
OpenValue = Callable[[object], Value]

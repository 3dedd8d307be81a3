"""Opens values of an inert pickle: which record is a dict, a dataclass, a tensor or a whole module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch

from te_export.checkpoint.inert import Inert, Name
from te_export.checkpoint.inert_module import is_module, read_module
from te_export.checkpoint.mappings import as_mapping
from te_export.checkpoint.storages import Storages
from te_export.checkpoint.tensors import build_tensor, describe_tensor, is_tensor
from te_export.checkpoint.values import (
    Module,
    OpenValue,
    Other,
    Record,
    Scalar,
    Sequence,
    Table,
    TensorValue,
    Value,
)

__all__ = ["inert_opener"]

_LIST_NAMES: Final = {Name("builtins", "list"), Name("builtins", "tuple"), Name("torch", "Size")}


def inert_opener(storages: Storages) -> OpenValue:
    """A function that opens one level of an inert value, with tensors read from `storages`."""

    opened: dict[int, Value] = {}  # by identity; what is opened lives as long as the pickle's tree

    def open_inert(value: object) -> Value:
        if id(value) not in opened:
            opened[id(value)] = _open(value, storages)
        return opened[id(value)]

    return open_inert


def _open(value: object, storages: Storages) -> Value:
    if value is None or isinstance(value, bool | int | float | str):
        return Scalar(value)
    if isinstance(value, list | tuple):
        return Sequence(tuple(value))
    mapping = as_mapping(value)
    if mapping is not None:
        return Table(mapping)
    if isinstance(value, Inert):
        return _open_record(value, storages)
    return Other(f"a {type(value).__name__}")


def _open_record(record: Inert, storages: Storages) -> Value:
    if is_tensor(record):
        return TensorValue(_loader(record, storages))
    class_name = record.name.qualname.rpartition(".")[2] if record.name else "object"
    if is_module(record):
        return Module(class_name, lambda: read_module(record))
    class_name = record.name.qualname.rpartition(".")[2] if record.name else "object"
    if (
        record.name in _LIST_NAMES
        and len(record.arguments) == 1
        and isinstance(record.arguments[0], list | tuple)
    ):
        return Sequence(tuple(record.arguments[0]))
    state = record.state
    if isinstance(state, Mapping):
        return Record(class_name, {name: value for name, value in state.items() if isinstance(name, str)})
    return Other(f"a {class_name}")


def _loader(record: Inert, storages: Storages) -> Callable[[], torch.Tensor]:
    return lambda: build_tensor(describe_tensor(record), storages)

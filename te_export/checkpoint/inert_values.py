"""Opens values of an inert pickle: which record is a dict, a dataclass, a tensor or a whole module."""

from __future__ import annotations

from typing import Final

from te_export.checkpoint.inert import Inert, Name
from te_export.checkpoint.inert_module import is_module, read_module
from te_export.checkpoint.mappings import as_mapping
from te_export.checkpoint.numpy_scalars import read_numpy_scalar
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
from te_export.checkpoint.work_limit import WorkLimit

__all__ = ["inert_opener"]

_LIST_NAMES: Final = {Name("builtins", "list"), Name("builtins", "tuple"), Name("torch", "Size")}


def inert_opener(storages: Storages) -> OpenValue:
    """A function that opens one level of an inert value, with tensors read from `storages`."""
    limit = WorkLimit()
    opened: dict[int, Value] = {}  # by identity; what is opened lives as long as the pickle's tree

    def open_inert(value: object) -> Value:
        if id(value) not in opened:
            opened[id(value)] = _open(value, storages, limit)
        return opened[id(value)]

    return open_inert


def _open(value: object, storages: Storages, limit: WorkLimit) -> Value:
    if value is None or isinstance(value, bool | int | float | str):
        return Scalar(value)
    mapping = as_mapping(value, limit)
    if mapping is not None:
        return Table(mapping)
    if isinstance(value, list | tuple):
        limit.spend(len(value))
        return Sequence(tuple(value))
    if isinstance(value, Inert):
        return _open_record(value, storages, limit)
    return Other(f"a {type(value).__name__}")


def _open_record(record: Inert, storages: Storages, limit: WorkLimit) -> Value:
    if is_tensor(record):
        return TensorValue(lambda: build_tensor(describe_tensor(record), storages))
    number = read_numpy_scalar(record)
    if number is not None:
        return Scalar(number)
    class_name = record.name.qualname.rpartition(".")[2] if record.name else "object"
    if is_module(record):
        return Module(class_name, lambda: read_module(record, limit))
    first = record.arguments[0] if len(record.arguments) == 1 else None
    if record.name in _LIST_NAMES and isinstance(first, list | tuple):
        return _open(first, storages, limit)
    if isinstance(record.state, dict):
        limit.spend(len(record.state))
        fields = {name: value for name, value in record.state.items() if isinstance(name, str)}
        return Record(class_name, fields)
    return Other(f"a {class_name}")

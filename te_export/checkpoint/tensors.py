"""Tensors from the records a pickle keeps of them: bounds first, then a view of the storage.

Inert(torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, …)) → StoredTensor → torch.Tensor
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from te_export.checkpoint.inert import Inert, Name
from te_export.checkpoint.shown import shown
from te_export.checkpoint.storages import DTYPES, StorageRef, Storages
from te_export.errors import CheckpointError

__all__ = ["StoredTensor", "build_tensor", "describe_tensor", "is_tensor"]

_UTILS: Final = "torch._utils"
_DENSE: Final = {"_rebuild_tensor": 4, "_rebuild_tensor_v2": 6, "_rebuild_tensor_v3": 7}
_PARAMETERS: Final = {
    Name(_UTILS, "_rebuild_parameter"),
    Name(_UTILS, "_rebuild_parameter_with_state"),
    Name("torch.nn.parameter", "Parameter"),
    Name("torch.nn.parameter", "Buffer"),
}
_FROM_TYPE: Final = Name("torch._tensor", "_rebuild_from_type_v2")
_MAX_DIMENSIONS: Final = 64
_MAX_NUMEL: Final = 1 << 48


@dataclass(frozen=True)
class StoredTensor:
    """A dense tensor as a view of a storage; offset and stride in elements of `dtype`."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def is_tensor(value: object) -> bool:
    """Whether the record is one of a tensor, of whatever kind."""
    if not isinstance(value, Inert) or value.name is None:
        return False
    name = value.name
    return (
        name in _PARAMETERS
        or name == _FROM_TYPE
        or (name.module == _UTILS and name.qualname.startswith("_rebuild"))
    )


def describe_tensor(value: object) -> StoredTensor:
    """Read the record of a dense tensor or parameter.

    Raises:
        CheckpointError: another kind of tensor, an unsupported dtype, or values that do not fit together.
    """
    record = _unwrap(value)
    name = record.name
    least = _DENSE.get(name.qualname, 0) if name is not None and name.module == _UTILS else 0
    if not least:
        raise CheckpointError(f"is made by {name}, expected a dense tensor; save a dense copy of it")
    if len(record.arguments) < least or not isinstance(record.arguments[0], StorageRef):
        raise CheckpointError(f"has a malformed {name} record; the file is damaged")
    return _described(record, record.arguments[0], is_v3=least == 7)


def build_tensor(stored: StoredTensor, storages: Storages) -> torch.Tensor:
    """The tensor itself, a view of the storage's bytes; tensors of one storage share them.

    Raises:
        CheckpointError: the view does not lie within the storage, or the storage cannot be read.
    """
    ref = stored.storage
    item_bytes = stored.dtype.itemsize
    available = ref.view_numel * ref.item_bytes // item_bytes
    numel = math.prod(stored.size)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(stored.size, stored.stride, strict=True))
    if numel and (stored.offset + extent > available or numel > available):
        raise CheckpointError(
            f"has size {stored.size}, stride {stored.stride} and offset {stored.offset}, which needs more "
            f"than the {available} elements of storage {shown(ref.key)}; if it was expanded, save a "
            "contiguous copy, else the file is damaged"
        )
    if numel == 0:
        return torch.empty(stored.size, dtype=stored.dtype)
    begin = ref.view_offset * ref.item_bytes
    elements = storages.bytes_of(ref)[begin : begin + available * item_bytes].view(stored.dtype)
    return elements.as_strided(stored.size, stored.stride, elements.storage_offset() + stored.offset)


def _unwrap(value: object) -> Inert:
    for _ in range(4):  # a Parameter around a subclass around a tensor is as deep as torch writes
        if not isinstance(value, Inert):
            break
        if value.name in _PARAMETERS and value.arguments:
            value = value.arguments[0]
        elif value.name == _FROM_TYPE and len(value.arguments) == 4 and isinstance(value.arguments[2], tuple):
            value = Inert(value.arguments[0], value.arguments[2])
        else:
            return value
    raise CheckpointError("is a parameter without a tensor (not initialized?); the file is damaged")


def _described(record: Inert, ref: StorageRef, *, is_v3: bool) -> StoredTensor:
    _, offset, size, stride = record.arguments[:4]
    extra = record.arguments[7 if is_v3 else 6 :]
    if any(extra):
        raise CheckpointError("is a conjugate or negative view; save a resolved copy of it")
    dtype = _dtype_named(record.arguments[6]) if is_v3 else ref.dtype
    if dtype is None:
        raise CheckpointError(
            f"lies in a {ref.type_name}, expected one of {', '.join(DTYPES)}; convert it and save again"
        )
    sizes, strides = _counts(size, "size"), _counts(stride, "stride")
    if len(sizes) != len(strides):
        raise CheckpointError(f"has {len(sizes)} sizes and {len(strides)} strides; the file is damaged")
    if math.prod(max(each, 1) for each in sizes) > _MAX_NUMEL:
        raise CheckpointError(f"has size {sizes}, more than any storage holds; the file is damaged")
    return StoredTensor(ref, dtype, _counts((offset,), "offset")[0], sizes, strides)


def _dtype_named(value: object) -> torch.dtype:
    name = value.qualname if isinstance(value, Name) and value.module == "torch" else ""
    if name not in DTYPES:
        raise CheckpointError(
            f"has dtype {name or 'unknown'}, expected one of {', '.join(DTYPES)}; convert it and save again"
        )
    return DTYPES[name]


def _counts(value: object, what: str) -> tuple[int, ...]:
    if isinstance(value, Inert) and value.name == Name("torch", "Size") and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple | list) or len(value) > _MAX_DIMENSIONS:
        raise CheckpointError(
            f"has no list of at most {_MAX_DIMENSIONS} numbers for its {what}; the file is damaged"
        )
    for each in value:
        if not isinstance(each, int) or isinstance(each, bool) or not 0 <= each <= _MAX_NUMEL:
            raise CheckpointError(f"has {shown(each)} in its {what}, expected a count; the file is damaged")
    return tuple(value)

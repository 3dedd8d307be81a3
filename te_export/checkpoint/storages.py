"""Storages: the runs of bytes that tensors of a torch checkpoint are views of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeGuard

import torch

from te_export.checkpoint.inert import Name
from te_export.checkpoint.shown import shown
from te_export.errors import CheckpointError

__all__ = ["DTYPES", "StorageRef", "Storages", "parse_storage_id"]

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
_DTYPE_OF_STORAGE: Final[Mapping[str, torch.dtype]] = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
# Only needed to find the end of a storage in the old format; tensors of these types are refused.
_OTHER_ITEM_BYTES: Final[Mapping[str, int]] = {
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
    "QInt8Storage": 1,
    "QUInt8Storage": 1,
    "QInt32Storage": 4,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
}
_MAX_NUMEL: Final = 1 << 48


@dataclass(frozen=True, slots=True)
class StorageRef:
    """What a pickle says of one storage.

    Attributes:
        key: names the storage in its file.
        type_name: `FloatStorage` and so on; `UntypedStorage` counts bytes.
        numel: number of elements.
        view_offset: where in the storage the part that is meant begins, in elements; 0 but in very old files.
        view_numel: length of that part, in elements.
    """

    key: str
    type_name: str
    numel: int
    view_offset: int
    view_numel: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Element type; None where it is one that is not read. uint8 where the storage is untyped."""
        return _DTYPE_OF_STORAGE.get(self.type_name)

    @property
    def item_bytes(self) -> int:
        return self.dtype.itemsize if self.dtype else _OTHER_ITEM_BYTES[self.type_name]

    @property
    def size_bytes(self) -> int:
        return self.numel * self.item_bytes


class Storages(Protocol):
    """Where the bytes of storages come from."""

    def bytes_of(self, ref: StorageRef) -> torch.Tensor:
        """The whole storage as uint8 (size_bytes,), the same memory each time it is asked for.

        Raises:
            CheckpointError: the storage is missing, damaged, or not as long as `ref` says.
        """
        ...


def parse_storage_id(value: object) -> StorageRef:
    """Read the persistent id ("storage", type, key, location, numel[, view]) of a torch checkpoint.

    The location (such as cuda:0) is dropped: everything is read to the CPU.

    Raises:
        CheckpointError: the id is something else.
    """
    parts = value if isinstance(value, tuple) else ()
    if len(parts) not in (5, 6) or parts[0] != "storage":
        raise CheckpointError("the pickle holds a persistent id that is no storage; the file is damaged")
    kind, key, _location, numel = parts[1:5]
    view = parts[5] if len(parts) == 6 else None
    type_name = kind.qualname if isinstance(kind, Name) else ""
    if type_name not in _DTYPE_OF_STORAGE and type_name not in _OTHER_ITEM_BYTES:
        raise CheckpointError(
            f"storage {shown(key)} is of type {shown(type_name)}, expected FloatStorage or its like"
        )
    if not isinstance(key, str) or not _is_count(numel):
        raise CheckpointError(
            f"storage {shown(key)} says it has {shown(numel)} elements; the file is damaged"
        )
    view_offset, view_numel = _view(view, numel)
    return StorageRef(key, type_name, numel, view_offset, view_numel)


def _view(view: object, numel: int) -> tuple[int, int]:
    if view is None:
        return 0, numel
    if isinstance(view, tuple) and len(view) == 3:
        _key, offset, size = view
        if _is_count(offset) and _is_count(size) and offset + size <= numel:
            return offset, size
    raise CheckpointError(
        f"a view of a storage of {numel} elements does not lie within it; the file is damaged"
    )


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_NUMEL

"""The format of torch.save before 1.6: five pickles in a row, then the storages.

magic number · protocol version · machine (byte order) · the object · list of storage keys
then per key: number of elements (8 bytes, little-endian) and the elements
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from te_export.checkpoint.inert import Name
from te_export.checkpoint.inert_pickle import read_inert_pickle
from te_export.checkpoint.opened_file import OpenedFile
from te_export.checkpoint.pickle_names import require_known_names
from te_export.checkpoint.shown import shown
from te_export.checkpoint.storages import StorageRef, parse_storage_id
from te_export.errors import CheckpointError

__all__ = ["LegacyStorages", "TorchLegacy", "read_torch_legacy"]

_MAGIC_NUMBER: Final = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION: Final = 1001
_NUMEL_BYTES: Final = 8


@dataclass(frozen=True)
class TorchLegacy:
    """A file whose pickles were read inertly.

    Attributes:
        value: what the object's pickle describes.
        storages: where its tensors' bytes come from.
        notes: what a person may want to know of the file.
    """

    value: object
    storages: LegacyStorages
    notes: tuple[str, ...]


class LegacyStorages:
    """Storages one after the other at the end of the file; implements `Storages`."""

    def __init__(self, file: OpenedFile, offsets: Mapping[str, int]) -> None:
        self._file = file
        self._offsets = offsets
        self._loaded: dict[str, torch.Tensor] = {}

    def bytes_of(self, ref: StorageRef) -> torch.Tensor:
        """The storage as uint8 (size_bytes,), mapped from the file where its place is aligned."""
        if ref.key not in self._loaded:
            if ref.key not in self._offsets:
                raise CheckpointError(f"storage {shown(ref.key)} is not in the file; the file is damaged")
            self._loaded[ref.key] = self._file.byte_tensor(
                self._offsets[ref.key], ref.size_bytes, alignment_bytes=ref.item_bytes
            )
        return self._loaded[ref.key]


class _StorageIds:
    """Reads persistent ids, and remembers the storages they name: only they tell the element size of each."""

    def __init__(self) -> None:
        self.refs: dict[str, StorageRef] = {}

    def load(self, value: object) -> object:
        if (
            isinstance(value, tuple)
            and len(value) == 4
            and value[0] == "module"
            and isinstance(value[1], Name)
        ):
            return value[1]  # a layer's class, with its source code, which is not needed
        ref = parse_storage_id(value)
        known = self.refs.setdefault(ref.key, ref)
        if (known.numel, known.item_bytes) != (ref.numel, ref.item_bytes):
            raise CheckpointError(f"storage {shown(ref.key)} is described in two ways; the file is damaged")
        return ref


def read_torch_legacy(file: OpenedFile) -> TorchLegacy:
    """Read the file's pickles without running anything, and find its storages.

    Raises:
        CheckpointError: the file is damaged, cut short, or big-endian.
        UntrustedPickleError: a pickle names classes or functions that would have to run.
    """
    ids = _StorageIds()
    values: list[object] = []
    end = 0
    for part in ("magic number", "protocol version", "machine", "object", "storage keys"):
        try:
            pickle = read_inert_pickle(file.mapped, start=end, persistent_load=ids.load)
        except CheckpointError as error:
            raise CheckpointError(f"pickle of the {part}: {error}") from error
        require_known_names(pickle.names)
        values.append(pickle.value)
        end = pickle.end
    magic, version, machine, value, keys = values
    if magic != _MAGIC_NUMBER or version != _PROTOCOL_VERSION:
        raise CheckpointError(f"is of torch file version {shown(version)}, expected {_PROTOCOL_VERSION}")
    if isinstance(machine, dict) and machine.get("little_endian") is not True:
        raise CheckpointError(
            "was saved on a big-endian machine, expected little; save it again on a common machine"
        )
    offsets, end = _offsets(file, keys, ids.refs, start=end)
    left = file.size_bytes - end
    notes = [f"{left} bytes after the last storage were ignored"] if left else []
    return TorchLegacy(value, LegacyStorages(file, offsets), tuple(notes))


def _offsets(
    file: OpenedFile, keys: object, refs: Mapping[str, StorageRef], *, start: int
) -> tuple[dict[str, int], int]:
    """Position of each storage's first element, and the position after the last storage."""
    if (
        not isinstance(keys, list)
        or len(keys) != len(refs)
        or {key for key in keys if isinstance(key, str)} != set(refs)
    ):
        raise CheckpointError("lists other storages than its tensors lie in; the file is damaged")
    offsets: dict[str, int] = {}
    for key in keys:
        ref = refs[key]
        numel = int.from_bytes(file.mapped[start : start + _NUMEL_BYTES], "little")
        if numel != ref.numel:
            raise CheckpointError(
                f"storage {shown(key)} at byte {start} has {numel} elements, expected {ref.numel}; the "
                "file is damaged"
            )
        offsets[key] = start + _NUMEL_BYTES
        start = offsets[key] + ref.size_bytes
        if start > file.size_bytes:
            raise CheckpointError(
                f"storage {shown(key)} ends at byte {start}, found {file.size_bytes}: the file is cut short; "
                "copy or download it again"
            )
    return offsets, start

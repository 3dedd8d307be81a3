"""The zip format of torch.save: `<root>/data.pkl` and one record `<root>/data/<key>` per storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from te_export.checkpoint.inert_pickle import InertPickle, read_inert_pickle
from te_export.checkpoint.opened_file import OpenedFile
from te_export.checkpoint.pickle_names import require_known_names
from te_export.checkpoint.pickle_stream import MAX_PICKLE_BYTES
from te_export.checkpoint.shown import shown
from te_export.checkpoint.sniff import refuse_foreign_archive
from te_export.checkpoint.storages import StorageRef, parse_storage_id
from te_export.checkpoint.zip_records import ZipRecords, open_zip_records
from te_export.errors import CheckpointError

__all__ = ["TorchZip", "read_torch_zip"]

_MAX_SMALL_RECORD_BYTES: Final = 64


@dataclass(frozen=True)
class TorchZip:
    """An archive whose pickle was read inertly.

    Attributes:
        value: what the pickle describes.
        storages: where its tensors' bytes come from.
        notes: what a person may want to know of the archive.
    """

    value: object
    storages: ZipStorages
    notes: tuple[str, ...]


class ZipStorages:
    """Storages in the records `<root>/data/<key>`; implements `Storages`."""

    def __init__(self, records: ZipRecords, folder: str) -> None:
        self._records = records
        self._folder = folder
        self._loaded: dict[str, torch.Tensor] = {}

    def bytes_of(self, ref: StorageRef) -> torch.Tensor:
        """The storage as uint8 (size_bytes,), mapped from the file where it is stored uncompressed."""
        name = f"{self._folder}{ref.key}"
        record = self._records.records.get(name)
        if record is not None and record.size_bytes != ref.size_bytes:
            raise CheckpointError(
                f"record {shown(name)} has {record.size_bytes} bytes, expected {ref.size_bytes} "
                f"({ref.numel} elements of {ref.item_bytes}); the file is damaged"
            )
        if ref.key not in self._loaded:
            self._loaded[ref.key] = self._records.byte_tensor(name, alignment_bytes=8)
        return self._loaded[ref.key]


def read_torch_zip(file: OpenedFile) -> TorchZip:
    """Read the archive's pickle without running anything, and find its storages.

    Raises:
        CheckpointError: it is another kind of zip archive, damaged, or big-endian.
        UntrustedPickleError: the pickle names classes or functions that would have to run.
    """
    records = open_zip_records(file)
    refuse_foreign_archive(records.records)
    root = _root(records)
    order = f"{root}byteorder"
    if order in records.records:
        found = records.read(order, max_bytes=_MAX_SMALL_RECORD_BYTES)
        if found != b"little":
            raise CheckpointError(
                f"has byte order {shown(found)}, expected little; save it again on a common machine"
            )
    pickle = _read_pickle(records.read(f"{root}data.pkl", max_bytes=MAX_PICKLE_BYTES))
    require_known_names(pickle.names)
    notes = (
        [] if records.has_checksums else ["the file was saved without checksums: damage to it would not show"]
    )
    return TorchZip(pickle.value, ZipStorages(records, f"{root}data/"), tuple(notes))


def _read_pickle(data: bytes) -> InertPickle:
    try:
        return read_inert_pickle(data, persistent_load=parse_storage_id)
    except CheckpointError as error:
        raise CheckpointError(f"record data.pkl: {error}") from error


def _root(records: ZipRecords) -> str:
    """The folder that holds data.pkl, with its slash; empty where the archive has no folder."""
    roots = [
        name.removesuffix("data.pkl")
        for name in records.records
        if name == "data.pkl" or name.endswith("/data.pkl")
    ]
    roots = [root for root in roots if root.count("/") <= 1]
    if len(roots) != 1:
        raise CheckpointError(f"holds {len(roots)} pickles named data.pkl at its root, expected one")
    return roots[0]

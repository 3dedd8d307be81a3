"""The records of a torch zip archive, each checked before use: place, length and checksum.

Stored records are mapped from the file and take no memory of their own; deflated ones (an archive that was
zipped again by another tool) are unpacked within a budget.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from te_export.checkpoint.opened_file import OpenedFile
from te_export.checkpoint.shown import shown
from te_export.errors import CheckpointError

__all__ = ["ZipRecord", "ZipRecords", "open_zip_records"]

_LOCAL_HEADER: Final = struct.Struct("<4sHHHHHIIIHH")
_LOCAL_MAGIC: Final = b"PK\x03\x04"
_ENCRYPTED: Final = 0x1
_CHUNK_BYTES: Final = 1 << 20
_FREE_EXPANSION_BYTES: Final = 1 << 26
_MAX_EXPANSION: Final = 100
_DAMAGED: Final = "the file is damaged; copy or download it again"


@dataclass(frozen=True)
class ZipRecord:
    """One file in the archive.

    Attributes:
        name: with the archive's root folder.
        offset: of its first byte in the file.
        packed_bytes: length in the file.
        size_bytes: length of the content.
        crc32: of the content.
        is_stored: not compressed.
    """

    name: str
    offset: int
    packed_bytes: int
    size_bytes: int
    crc32: int
    is_stored: bool


class ZipRecords:
    """Reads records of one archive; keeps count of the memory that unpacking takes."""

    def __init__(self, file: OpenedFile, records: Mapping[str, ZipRecord]) -> None:
        self._file = file
        self.records = records
        self.has_checksums = any(record.crc32 for record in records.values())
        self._expansion_left = _FREE_EXPANSION_BYTES + _MAX_EXPANSION * file.size_bytes

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """The content of a small record.

        Raises:
            CheckpointError: no such record, longer than `max_bytes`, or damaged.
        """
        record = self._find(name)
        if record.size_bytes > max_bytes:
            raise CheckpointError(
                f"record {shown(name)} has {record.size_bytes} bytes, expected at most {max_bytes}"
            )
        return self.byte_tensor(name, alignment_bytes=1).numpy().tobytes()

    def byte_tensor(self, name: str, *, alignment_bytes: int) -> torch.Tensor:
        """The content of a record as uint8 (size_bytes,), mapped from the file where stored and aligned.

        Raises:
            CheckpointError: no such record, its checksum or length differs, or it unpacks to too much.
        """
        record = self._find(name)
        if not record.is_stored:
            return self._unpack(record)
        if self.has_checksums:
            found = 0
            for piece in self._file.chunks(record.offset, record.size_bytes):
                found = zlib.crc32(piece, found)
            _require_checksum(record, found)
        return self._file.byte_tensor(record.offset, record.size_bytes, alignment_bytes=alignment_bytes)

    def _find(self, name: str) -> ZipRecord:
        record = self.records.get(name)
        if record is None:
            raise CheckpointError(f"has no record {shown(name)}, which its pickle refers to; {_DAMAGED}")
        return record

    def _unpack(self, record: ZipRecord) -> torch.Tensor:
        self._expansion_left -= record.size_bytes
        if self._expansion_left < 0:
            raise CheckpointError(
                f"record {shown(record.name)} unpacks to {record.size_bytes} bytes, which with the records "
                f"before it is more than {_MAX_EXPANSION} times the file; save the checkpoint again with "
                "torch.save"
            )
        unpacked = bytearray()
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            for piece in self._file.chunks(record.offset, record.packed_bytes):
                # one byte more than declared, so that a longer record shows
                unpacked += inflate.decompress(piece, record.size_bytes + 1 - len(unpacked))
                if inflate.unconsumed_tail or len(unpacked) > record.size_bytes:
                    break
        except zlib.error as error:
            raise CheckpointError(
                f"record {shown(record.name)} does not unpack: {error}; {_DAMAGED}"
            ) from error
        if len(unpacked) != record.size_bytes or not inflate.eof:
            raise CheckpointError(
                f"record {shown(record.name)} declares {record.size_bytes} bytes and does not unpack to that "
                f"many; {_DAMAGED}"
            )
        if self.has_checksums:
            _require_checksum(record, zlib.crc32(unpacked))
        return (
            torch.frombuffer(unpacked, dtype=torch.uint8) if unpacked else torch.empty(0, dtype=torch.uint8)
        )


def open_zip_records(file: OpenedFile) -> ZipRecords:
    """List the archive's records, and check that each has a name and a place of its own.

    Raises:
        CheckpointError: no readable directory of records, a record that is encrypted, of an unknown
            compression, named twice, outside the archive, or overlapping another.
    """
    try:
        with zipfile.ZipFile(file.stream) as archive:
            entries, directory_start = archive.infolist(), archive.start_dir
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        EOFError,
        struct.error,
        LookupError,
    ) as error:
        raise CheckpointError(f"is a zip archive cut short or damaged: {error!s:.120}; {_DAMAGED}") from error
    records: dict[str, ZipRecord] = {}
    end = 0
    for entry in sorted(entries, key=lambda each: each.header_offset):
        if entry.filename in records:
            raise CheckpointError(
                f"holds two records named {shown(entry.filename)}, expected one; {_DAMAGED}"
            )
        record = _located(file, entry)
        if entry.header_offset < end or record.offset + record.packed_bytes > directory_start:
            raise CheckpointError(f"record {shown(record.name)} overlaps another one; {_DAMAGED}")
        end = record.offset + record.packed_bytes
        records[record.name] = record
    return ZipRecords(file, records)


def _located(file: OpenedFile, entry: zipfile.ZipInfo) -> ZipRecord:
    name = entry.filename
    title = f"record {shown(name)}"
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise CheckpointError(f"{title} has a name that leads out of the archive, expected a plain path")
    if entry.flag_bits & _ENCRYPTED:
        raise CheckpointError(f"{title} is encrypted; decrypt the archive first")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(
            f"{title} is compressed by method {entry.compress_type}, expected none or deflate"
        )
    is_stored = entry.compress_type == zipfile.ZIP_STORED
    header = (
        file.mapped[entry.header_offset : entry.header_offset + _LOCAL_HEADER.size]
        if entry.header_offset >= 0
        else b""
    )
    if len(header) < _LOCAL_HEADER.size or header[:4] != _LOCAL_MAGIC:
        raise CheckpointError(f"{title} has no header at byte {entry.header_offset}; {_DAMAGED}")
    _, _, _, method, _, _, _, _, _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    if method != entry.compress_type or (is_stored and entry.compress_size != entry.file_size):
        raise CheckpointError(f"{title} is described in two ways by its header and the directory; {_DAMAGED}")
    offset = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    return ZipRecord(name, offset, entry.compress_size, entry.file_size, entry.CRC, is_stored)


def _require_checksum(record: ZipRecord, found: int) -> None:
    if found != record.crc32:
        raise CheckpointError(
            f"record {shown(record.name)} has checksum {found:08x}, expected {record.crc32:08x}: its bytes "
            f"changed after it was saved; {_DAMAGED}"
        )

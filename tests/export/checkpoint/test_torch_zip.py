"""The zip container: checksums, archives that were packed again, and everything a record can get wrong."""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from te_export.checkpoint import read_checkpoint
from te_export.errors import CheckpointError

STATE = {"w": torch.arange(64.0)}


def repack(path: Path, change=lambda name, data: data, compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive written again by the zipfile module, with records changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    path.write_bytes(buffer.getvalue())
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_packed_again_by_another_tool(save, compression):
    path = repack(save(STATE), compression=compression)
    assert torch.equal(read_checkpoint(path).state["w"], STATE["w"])


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions(save, compression):
    with pytest.raises(CheckpointError, match="is compressed by method"):
        read_checkpoint(repack(save(STATE), compression=compression))


@pytest.mark.parametrize("record", ["data.pkl", "byteorder", "data/0"])
def test_a_flipped_bit_is_found(save, record):
    path = save(STATE)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        content = archive.read(f"model/{record}")
    at = data.index(content, data.index(record.encode()))
    data[at + len(content) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert re.search(
        rf"record 'model/{record}' has checksum [0-9a-f]{{8}}, expected [0-9a-f]{{8}}", str(caught.value)
    )


def test_a_file_saved_without_checksums(save):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(STATE)
    finally:
        torch.serialization.set_crc32_options(True)
    found = read_checkpoint(path)
    assert torch.equal(found.state["w"], STATE["w"])
    assert found.notes == ("the file was saved without checksums: damage to it would not show",)


def test_big_endian(save):
    path = repack(save(STATE), lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(CheckpointError, match="has byte order b'big', expected little"):
        read_checkpoint(path)


def test_files_of_old_torch_have_no_byte_order(save):
    path = repack(save(STATE), lambda name, data: None if name.endswith("byteorder") else data)
    assert torch.equal(read_checkpoint(path).state["w"], STATE["w"])


def test_a_missing_record(save):
    path = repack(save(STATE), lambda name, data: None if name.endswith("data/0") else data)
    with pytest.raises(CheckpointError, match="parameter 'w': has no record 'model/data/0'"):
        read_checkpoint(path)


@pytest.mark.parametrize("size_bytes", [0, 255, 257])
def test_a_record_of_another_length(save, size_bytes):
    path = repack(save(STATE), lambda name, data: bytes(size_bytes) if name.endswith("data/0") else data)
    with pytest.raises(
        CheckpointError, match=rf"'model/data/0' has {size_bytes} bytes, expected 256 \(64 elements of 4\)"
    ):
        read_checkpoint(path)


def write_zip(path: Path, entries: list[tuple[str, bytes, dict[str, int]]]) -> Path:
    """A zip archive written by hand; each entry's dict overrides fields of its directory entry."""
    body, directory = bytearray(), bytearray()
    for name, data, fields in entries:
        encoded = name.encode()
        method = fields.get("method", 0)
        packed = fields.get("packed", len(data))
        crc = fields.get("crc", zlib.crc32(data))
        size = fields.get("size", len(data))
        offset = fields.get("offset", len(body))
        flags = fields.get("flags", 0)
        body += struct.pack(
            "<4sHHHHHIIIHH", b"PK\x03\x04", 20, flags, method, 0, 0, crc, packed, size, len(encoded), 0
        )
        body += encoded + data
        directory += struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            b"PK\x01\x02", 20, 20, flags, method, 0, 0, crc, packed, size, len(encoded), 0, 0, 0, 0, 0, offset,
        )  # fmt: skip
        directory += encoded
    end = struct.pack(
        "<4sHHHHIIH", b"PK\x05\x06", 0, 0, len(entries), len(entries), len(directory), len(body), 0
    )
    path.write_bytes(body + directory + end)
    return path


def parts(save) -> tuple[bytes, bytes]:
    with zipfile.ZipFile(save(STATE)) as archive:
        return archive.read("model/data.pkl"), archive.read("model/data/0")


def test_an_archive_by_hand(save, tmp_path):
    pickle, weights = parts(save)
    path = write_zip(tmp_path / "h.pt", [("m/data.pkl", pickle, {}), ("m/data/0", weights, {})])
    assert torch.equal(read_checkpoint(path).state["w"], STATE["w"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offset": 0}, "overlaps another"),
        ({"offset": 1}, "has no header at byte 1"),
        ({"offset": 1 << 31}, "has no header at byte"),
        ({"packed": 1 << 20, "size": 1 << 20}, "overlaps another"),
        ({"size": 255}, "described in two ways"),
        ({"method": 99}, "compressed by method 99"),
        ({"flags": 1}, "is encrypted"),
        ({"crc": 1}, "has checksum"),
        ({"method": 8}, "does not unpack"),
    ],
)
def test_directory_entries_that_lie(save, tmp_path, fields, message):
    pickle, weights = parts(save)
    path = write_zip(tmp_path / "h.pt", [("m/data.pkl", pickle, {}), ("m/data/0", weights, fields)])
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert message in str(caught.value)


def test_two_records_of_one_name(save, tmp_path):
    pickle, weights = parts(save)
    entries = [("m/data.pkl", pickle, {}), ("m/data/0", weights, {}), ("m/data/0", bytes(256), {})]
    with pytest.raises(CheckpointError, match="two records named 'm/data/0'"):
        read_checkpoint(write_zip(tmp_path / "h.pt", entries))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "m/../../x", "m\\..\\x"])
def test_names_that_lead_out_of_the_archive(save, tmp_path, name):
    pickle, weights = parts(save)
    entries = [("m/data.pkl", pickle, {}), ("m/data/0", weights, {}), (name, b"", {})]
    with pytest.raises(CheckpointError, match="leads out of the archive"):
        read_checkpoint(write_zip(tmp_path / "h.pt", entries))


def test_the_legacy_format_checks_its_storages(save):
    path = save(STATE, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    path.write_bytes(data + b"more")
    assert read_checkpoint(path).notes == ("4 bytes after the last storage were ignored",)
    path.write_bytes(data[:-1])
    with pytest.raises(
        CheckpointError, match=f"ends at byte {len(data)}, found {len(data) - 1}: the file is cut short"
    ):
        read_checkpoint(path)
    path.write_bytes(data[:-264] + b"\x01" + data[-263:])
    with pytest.raises(CheckpointError, match="has 1 elements, expected 64"):
        read_checkpoint(path)
    path.write_bytes(re.sub(rb"(little_endianq.)\x88", lambda found: found[1] + b"\x89", data))
    with pytest.raises(CheckpointError, match="big-endian"):
        read_checkpoint(path)

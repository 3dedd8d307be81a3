"""What is no checkpoint is named for what it is, with what to do; the extension plays no part."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from te_export.checkpoint import read_checkpoint
from te_export.errors import CheckpointError


def zip_of(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


def torch_script() -> bytes:
    return zip_of(**{"m/data.pkl": b"N.", "m/constants.pkl": b"N.", "m/code/__torch__.py": b""})


def onnx_model() -> bytes:
    graph = onnx.helper.make_graph([], "g", [], [])
    return onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
CASES = {
    "empty": (b"", "is empty (0 bytes)"),
    "Git LFS pointer": (
        LFS,
        "Git LFS pointer of a file of 12345 bytes, not the file itself; run `git lfs pull`",
    ),
    "web page": (b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
    "XML error": (b'<?xml version="1.0"?><Error>', "is a web page"),
    "zeros": (bytes(100), "begins with 100 zero bytes"),
    "random": (bytes(range(200, 256)), "is of no known format (first bytes c8 c9 ca cb cc cd ce cf)"),
    "gzip": (gzip.compress(b"x"), "is a gzip file"),
    "tar": (tar(), "is a tar archive"),
    "npz": (npz(), "is a NumPy archive (.npz)"),
    "npy": (b"\x93NUMPY\x01\x00", "is a NumPy array"),
    "onnx": (onnx_model(), "is an ONNX model already"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "JSON": (b'{"a": 1}', "is JSON text"),
    "shard index": (
        b'{"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}',
        "index of sharded safetensors",
    ),
    "TorchScript": (torch_script(), "is a TorchScript archive"),
    "torch.export": (
        zip_of(**{"e/archive_format": b"pt2", "e/models/model.json": b"{}"}),
        "is a torch.export program",
    ),
    "old torch.export": (zip_of(**{"serialized_exported_program.json": b"{}"}), "is a torch.export program"),
    "torch.package": (
        zip_of(**{"p/.data/extern_modules": b"", "p/data.pkl": b"N."}),
        "is a torch.package archive",
    ),
    "zipped checkpoint": (zip_of(**{"run/model.pt": b"x"}), "is a zip archive around 'run/model.pt'"),
    "some zip": (zip_of(**{"word/document.xml": b"x"}), "without a data.pkl (it holds 'word/document.xml')"),
    "empty zip": (zip_of(), "without a data.pkl (it holds nothing)"),
    "two pickles": (zip_of(**{"a/data.pkl": b"N.", "b/data.pkl": b"N."}), "holds 2 pickles named data.pkl"),
    "plain pickle": (pickle.dumps({"a": 1}), "is a Python pickle that torch.save did not write"),
    "short safetensors": ((500).to_bytes(8, "little") + b'{"a"', "is a safetensors file cut short"),
    "bad safetensors": ((3).to_bytes(8, "little") + b"{a}", "is no readable safetensors file"),
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("extension", [".pt", ".safetensors"])
def test_other_files_are_named(tmp_path, kind, extension):
    data, message = CASES[kind]
    path = tmp_path / f"model{extension}"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_what_torch_itself_writes_for_other_uses(tmp_path):
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(1, 3),))
    torch.export.save(program, tmp_path / "e.pt2")
    with pytest.raises(CheckpointError, match=r"torch\.export program \(\.pt2\), not a state dict"):
        read_checkpoint(tmp_path / "e.pt2")


def test_a_safetensors_length_may_look_like_a_zip(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    length = int.from_bytes(b"PK", "little")
    path = tmp_path / "m"
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bytes(4))
    assert torch.equal(read_checkpoint(path).state["a"], torch.zeros(1))


def test_no_file(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"modle\.pt: no such file; the folder holds model\.pt"):
        read_checkpoint(tmp_path / "modle.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "none" / "modle.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(Path("a\0b"))


def test_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"is a folder, expected a file; it holds model\.safetensors"):
        read_checkpoint(tmp_path)


def test_a_pipe_and_a_device(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs named pipes, which Linux and macOS have")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="device, pipe or socket"):
            read_checkpoint(path)


def test_a_file_that_may_not_be_read(tmp_path):
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        pytest.skip("runs as root, which may read everything; an ordinary account runs it")
    path = tmp_path / "model.pt"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(CheckpointError, match="cannot be opened: Permission denied"):
        read_checkpoint(path)

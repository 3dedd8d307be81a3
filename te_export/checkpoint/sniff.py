"""Which container a file is, decided by its content: extensions are not looked at.

The order is: safetensors, what is known to be something else (refused by name), zip, the old torch format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from te_export.checkpoint.opened_file import OpenedFile
from te_export.checkpoint.shown import shown
from te_export.errors import CheckpointError

__all__ = ["PickleOrTensors", "refuse_foreign_archive", "sniff"]

PickleOrTensors = Literal["torch-zip", "torch-legacy", "safetensors"]

_HEAD_BYTES = 1024
_MAX_SAFETENSORS_HEADER_BYTES = 100_000_000

_EXPECTED = "expected a PyTorch checkpoint (.pt, .pth) or a .safetensors file"
_LEGACY_MAGIC = (b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"L119547037146038801333356L\n.")

_UNPACK = "unpack it and pass the checkpoint inside"
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a gzip file", _UNPACK),
    (b"BZh", "a bzip2 file", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd file", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-zip archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras weights?)", "save the weights from PyTorch"),
    (b"GGUF", "a GGUF file", "save the weights from PyTorch"),
    (b"\x93NUMPY", "a NumPy array (.npy)", "save model.state_dict() from PyTorch"),
    (b"%PDF", "a PDF file", "pass the checkpoint"),
    (b"\x89PNG", "a PNG image", "pass the checkpoint"),
)


def sniff(file: OpenedFile) -> PickleOrTensors:
    """Name the container of a file from its first bytes.

    Raises:
        CheckpointError: the content is recognized as something else, or not at all.
    """
    head = bytes(file.mapped[:_HEAD_BYTES])
    if _is_safetensors(head, file.size_bytes):  # first: the length it begins with may look like anything
        return "safetensors"
    _refuse_text(file, head)
    _refuse_binary(head)
    if head.startswith(b"PK"):
        return "torch-zip"
    if any(magic in head[:64] for magic in _LEGACY_MAGIC):
        return "torch-legacy"
    raise CheckpointError(_unknown(head))


def refuse_foreign_archive(names: Iterable[str]) -> None:
    """Refuse zip archives that are something else than a torch.save file, by what they hold.

    Raises:
        CheckpointError: TorchScript, torch.export, torch.package, NumPy, Keras and other archives.
    """
    files = [name for name in names if not name.endswith("/")]
    tails = {name.partition("/")[2] or name for name in files}
    save = "save the weights instead: torch.save(model.state_dict(), 'model.pt')"
    if "constants.pkl" in tails or any(tail.startswith("code/") for tail in tails):
        raise CheckpointError(f"is a TorchScript archive (torch.jit.save), not a checkpoint; {save}")
    if tails & {"archive_format", "serialized_exported_program.json", "models/model.json"}:
        raise CheckpointError(f"is a torch.export program (.pt2), not a state dict; {save}")
    if ".data/extern_modules" in tails:
        raise CheckpointError(f"is a torch.package archive, not a checkpoint; {save}")
    if "data.pkl" in tails:
        return
    if files and all(name.endswith(".npy") for name in files):
        raise CheckpointError(f"is a NumPy archive (.npz), {_EXPECTED}; save model.state_dict() from PyTorch")
    inside = [name for name in files if name.endswith((".pt", ".pth", ".safetensors"))]
    if inside:
        raise CheckpointError(f"is a zip archive around {shown(inside[0])}; {_UNPACK}")
    listed = ", ".join(shown(name) for name in files[:5]) or "nothing"
    raise CheckpointError(f"is a zip archive without a data.pkl (it holds {listed}), {_EXPECTED}")


def _refuse_text(file: OpenedFile, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        size = re.search(rb"\nsize (\d{1,20})\n", head)
        full = f" of a file of {size[1].decode()} bytes" if size else ""
        raise CheckpointError(
            f"is a Git LFS pointer{full}, not the file itself; run `git lfs pull` where it was cloned"
        )
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")):
        raise CheckpointError(
            "is a web page, not a checkpoint: the download got a page instead; download it again"
        )
    if text.startswith((b"{", b"[")):
        if b'"weight_map"' in file.mapped[: 1 << 20]:
            raise CheckpointError(
                "is the index of sharded safetensors files and holds no tensors; load the shards and save "
                "them as one .safetensors or .pt file"
            )
        raise CheckpointError(f"is JSON text, {_EXPECTED}")


def _refuse_binary(head: bytes) -> None:
    for signature, kind, advice in _SIGNATURES:
        if head.startswith(signature):
            raise CheckpointError(f"is {kind}, {_EXPECTED}; {advice}")
    if head[257:262] == b"ustar":
        raise CheckpointError(
            f"is a tar archive, {_EXPECTED}; if PyTorch before 0.2 wrote it, load it with that and save it "
            f"again, else {_UNPACK}"
        )
    # ModelProto: field 1 (ir_version, a small varint), then a length-delimited field 2, 3, 7 or 8
    if len(head) > 3 and head[0] == 0x08 and 1 <= head[1] <= 32 and head[2] in (0x12, 0x1A, 0x3A, 0x42):
        raise CheckpointError("is an ONNX model already, expected the PyTorch checkpoint it was made from")


def _is_safetensors(head: bytes, size_bytes: int) -> bool:
    header_bytes = int.from_bytes(head[:8], "little")
    if len(head) < 9 or head[8:9] != b"{" or not 2 <= header_bytes <= _MAX_SAFETENSORS_HEADER_BYTES:
        return False
    if 8 + header_bytes > size_bytes:
        raise CheckpointError(
            f"is a safetensors file cut short: its header takes {8 + header_bytes} bytes, found "
            f"{size_bytes}; copy or download it again"
        )
    return True


def _unknown(head: bytes) -> str:
    if head[:1] == b"\x80" and len(head) > 1 and 2 <= head[1] <= 5:
        return (
            "is a Python pickle that torch.save did not write (pickle.dump, joblib?); save it with "
            "torch.save(model.state_dict(), 'model.pt')"
        )
    if not any(head):
        return f"begins with {len(head)} zero bytes, {_EXPECTED}; was it copied or downloaded completely?"
    return f"is of no known format (first bytes {head[:8].hex(' ')}), {_EXPECTED}"

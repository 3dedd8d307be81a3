"""Reading a checkpoint: open, sniff, read the container, find the model."""

from __future__ import annotations

from pathlib import Path

from te_export.checkpoint.contents import Checkpoint, Container
from te_export.checkpoint.find_model import FoundModel, find_model
from te_export.checkpoint.inert_values import inert_opener
from te_export.checkpoint.live_values import open_live
from te_export.checkpoint.opened_file import OpenedFile, open_file
from te_export.checkpoint.safetensors_file import read_safetensors
from te_export.checkpoint.sniff import sniff
from te_export.checkpoint.torch_legacy import read_torch_legacy
from te_export.checkpoint.torch_zip import read_torch_zip
from te_export.checkpoint.trusted import read_trusted
from te_export.errors import CheckpointError, UntrustedPickleError

__all__ = ["read_checkpoint"]


def read_checkpoint(path: Path, *, trust_pickle: bool = False) -> Checkpoint:
    """Read a .pt, .pth or .safetensors file without running anything that it holds.

    Args:
        path: the file; its content decides the format, not its name.
        trust_pickle: load a file that cannot be read otherwise by running the code that it names.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, or no state dict in it.
        UntrustedPickleError: it can only be read by running code, and `trust_pickle` is False.
    """
    try:
        with open_file(path) as file:
            return _read(file, trust_pickle=trust_pickle)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}; check the disk") from error


def _read(file: OpenedFile, *, trust_pickle: bool) -> Checkpoint:
    container: Container = sniff(file)
    notes: tuple[str, ...] = ()
    try:
        found, notes = _read_inert(file, container)
    except UntrustedPickleError:
        if not trust_pickle:
            raise
        container = "trusted-pickle"
        found, notes = read_trusted(file), ("code that the file names was run (--trust-pickle)",)
    return Checkpoint(
        path=file.path,
        sha256=file.sha256(),
        size_bytes=file.size_bytes,
        container=container,
        state=found.state,
        config=found.config,
        config_source=found.config_source,
        task_names=found.task_names,
        layer_types=found.layer_types,
        notes=notes + found.notes,
    )


def _read_inert(file: OpenedFile, container: Container) -> tuple[FoundModel, tuple[str, ...]]:
    if container == "safetensors":
        return find_model(read_safetensors(file), open_live), ()
    archive = read_torch_zip(file) if container == "torch-zip" else read_torch_legacy(file)
    return find_model(archive.value, inert_opener(archive.storages)), archive.notes

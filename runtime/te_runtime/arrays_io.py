"""Input arrays from a file, and predictions to a file."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from te_runtime.errors import InputError
from te_runtime.manifest import TensorSpec
from te_runtime.npz import read_npy, read_npz
from te_runtime.prediction import Prediction

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "check_output_path",
    "check_output_spares",
    "default_output_path",
    "read_inputs",
    "write_predictions",
]

_NPY_MAGIC = b"\x93NUMPY"
_ZIP_MAGIC = b"PK"


def read_inputs(path: Path, specs: Sequence[TensorSpec]) -> dict[str, NDArray[np.generic]]:
    """Read a model's inputs from a .npy or .npz file.

    A file of one array feeds the only input, whatever the array's name. Names, dtypes and shapes are left to
    predict.

    Args:
        path: the file; its first bytes decide what it is, not its name.
        specs: the model's inputs.

    Returns:
        Arrays by name.

    Raises:
        InputError: the file is missing, damaged, of another kind, or one array for a model with several
            inputs.
    """
    magic = _first_bytes(path)
    names = ", ".join(spec.name for spec in specs)
    if magic.startswith(_NPY_MAGIC):
        if len(specs) != 1:
            raise InputError(f"{path}: one array, but the model has inputs {names}: write them with np.savez")
        return {specs[0].name: read_npy(path)}
    if not magic.startswith(_ZIP_MAGIC):
        raise InputError(f"{path}: neither .npy nor .npz: write the input with np.save or np.savez")
    arrays = read_npz(path)
    if len(arrays) == 1 and len(specs) == 1:
        return {specs[0].name: next(iter(arrays.values()))}
    return arrays


def default_output_path(path: Path) -> Path:
    """Where the predictions for an input file go: `x.npz` → `x-predictions.npz` beside it."""
    return path.with_name(f"{path.stem}-predictions.npz")


def check_output_path(path: Path, *, force: bool) -> None:
    """Check that predictions can go to `path`, before the work is done.

    Raises:
        InputError: it does not end in .npz, its folder is missing, or it is there already and `force` is not
            set.
    """
    if path.suffix != ".npz":
        raise InputError(f"{path}: expected an output name that ends in .npz")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder to write to")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file to write")
    if os.path.lexists(path) and not force:
        raise InputError(f"{path}: is there already. Pass --force to overwrite it, or another name with -o.")


def check_output_spares(path: Path, *, bundle: Path, input_file: Path) -> None:
    """Check that predictions written to `path` leave the bundle and the input as they are.

    Folders and files are compared by identity, so that symlinks, `..`, hard links and other spellings of a name
    are seen through. What does not exist is left to whoever opens it.

    Raises:
        InputError: `path` lies in the bundle, or is the input.
    """
    target, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    folders = {folder, *folder.parents, *target.parents}
    if any(_is_same(entry, bundle) for entry in folders):
        raise InputError(
            f"{path}: lies in the bundle {bundle}, which stays as it was exported. "
            "Pass -o with a file in another folder."
        )
    if _is_same(path, input_file):
        raise InputError(f"{path}: is the input itself. Pass -o with another name.")


def write_predictions(path: Path, predictions: Mapping[str, Prediction], *, force: bool = False) -> None:
    """Write predictions as `<task>.prediction` and `<task>.routing_weights`. The file appears whole or not at
    all.

    Args:
        path: the .npz file.
        predictions: what predict returned.
        force: overwrite a file that is there.

    Raises:
        InputError: as check_output_path, or the file cannot be written.
    """
    check_output_path(path, force=force)
    arrays = {}
    for task, prediction in predictions.items():
        arrays[f"{task}.prediction"] = prediction.output
        if prediction.routing_weights is not None:
            arrays[f"{task}.routing_weights"] = prediction.routing_weights
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist
        return False


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(_NPY_MAGIC))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{path}: cannot be read: {reason}") from error

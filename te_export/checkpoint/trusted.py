"""--trust-pickle: the checkpoint is loaded by torch.load, which runs whatever code the file names."""

from __future__ import annotations

import pickle
import re
import warnings

import torch

from te_export.checkpoint.find_model import FoundModel, find_model
from te_export.checkpoint.live_values import open_live
from te_export.checkpoint.opened_file import OpenedFile
from te_export.checkpoint.shown import shown
from te_export.errors import CheckpointError

__all__ = ["read_trusted"]

# What torch.load and the constructors of ordinary classes raise; code from the file can raise anything else,
# and that is left to the person who trusts it.
_LOAD_ERRORS = (
    ArithmeticError,
    AssertionError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def read_trusted(file: OpenedFile) -> FoundModel:
    """Load the checkpoint, running code it names, and find the model in it.

    Raises:
        CheckpointError: a class is missing, the code failed, or no model was found.
    """
    file.stream.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch and of the file's code, about each other's age
            value = torch.load(file.stream, map_location="cpu", weights_only=False)
            return find_model(value, open_live)
    except (AttributeError, ImportError) as error:
        raise CheckpointError(_missing(error)) from error
    except _LOAD_ERRORS as error:
        raise CheckpointError(
            f"torch.load failed with --trust-pickle: {type(error).__name__}: {error!s:.300}"
        ) from error


def _missing(error: AttributeError | ImportError) -> str:
    message = f"{error!s:.200}"
    if isinstance(error, ImportError):
        return (
            f"needs the module {shown(error.name or message)} to be loaded, which is not importable here; "
            "add the folder that holds it to PYTHONPATH or install it"
        )
    found = re.search(r"[Cc]an't get attribute '([^']+)' on <module '([^']+)'", message)
    if found is None:
        return (
            f"torch.load failed with --trust-pickle: AttributeError: {message}; is the code of the version "
            "that saved it?"
        )
    name, module = found.groups()
    if module == "__main__" or module.endswith(".__main__"):  # the latter under python -m
        return (
            f"needs the class {shown(name)} of the script that saved it, which is not running now (it was "
            "pickled from __main__); in that script, save torch.save(model.state_dict(), 'model.pt'), or "
            "move the class to a module, put that module on PYTHONPATH and save again"
        )
    return (
        f"needs {shown(name)} from module {shown(module)}, which does not have it here; put the version of "
        "the file that defines it on PYTHONPATH"
    )

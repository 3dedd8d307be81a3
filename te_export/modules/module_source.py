"""Where a module comes from: code that the user names, its weights from a checkpoint, or a .pt2 file."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from te_export.capture.torch_capture import quiet_torch
from te_export.checkpoint.contents import Checkpoint
from te_export.errors import CheckpointError, UsageError
from te_export.modules.blame import line_of_error
from te_export.modules.example_inputs import Example

__all__ = ["build_module", "load_weights", "read_pt2"]

_SHOWN = 8
_CHUNK = 2**20
_FORCE_SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def build_module(factory: str) -> nn.Module:
    """Import `package.module:factory` and call it: this runs the user's code.

    Raises:
        UsageError: there is no such module or name, it fails, or gives no torch module.
    """
    path, _, name = factory.partition(":")
    if not path or not name or path.startswith("."):
        raise UsageError(f"--model {factory!r}: expected package.module:factory, such as mypkg.models:build")
    with _importing_from_here():
        try:
            found = importlib.import_module(path)
        except ModuleNotFoundError as error:
            where = line_of_error(error)
            raise UsageError(
                f"--model {factory}: Python finds no module {error.name!r}{f' ({where})' if where else ''}. Run "
                "te-export in the folder that holds it, or install its package"
            ) from error
        except (Exception, SystemExit) as error:  # a script's argparse leaves by the latter
            raise UsageError(f"--model {factory}: {_failed(error, f'importing {path}')}") from error
        made = getattr(found, name, None)
        if made is None:
            near = difflib.get_close_matches(name, dir(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"--model {factory}: {path} has no {name!r}{hint}")
        if isinstance(made, nn.Module):
            return made
        if not callable(made):
            raise UsageError(
                f"--model {factory}: {name} is {type(made).__qualname__}, expected a function or class that gives a "
                "torch.nn.Module"
            )
        try:
            module = made()
        except (Exception, SystemExit) as error:
            raise UsageError(
                f"--model {factory}: {_failed(error, f'{name}()')}. It is called without arguments: write a function that "
                "fills them in"
            ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"--model {factory}: {name}() gave {type(module).__qualname__}, expected a torch.nn.Module"
        )
    return module


def load_weights(module: nn.Module, checkpoint: Checkpoint, factory: str) -> None:
    """Give a module the tensors of a checkpoint, every one by its name, in float32 whatever the module was built in.

    Raises:
        CheckpointError: names or shapes do not match; each kind is told with its first few.
    """
    module.float()
    own = module.state_dict()
    given = checkpoint.state
    missing = [name for name in own if name not in given]
    extra = [name for name in given if name not in own]
    shapes = [
        f"{name}: {list(given[name].shape)} in the file, {list(own[name].shape)} in the module"
        for name in own
        if name in given and not is_lazy(own[name]) and given[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"
        for what, names in (
            ("tensors of the module are missing in the file", missing),
            ("tensors of the file are unknown to the module", extra),
            ("tensors have another shape", shapes),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: does not fit the module that {factory} builds:\n  "
            + "\n  ".join(problems)
            + "\nHave the "
            "factory build the module with the settings it was trained with."
        )
    _refuse_nonfinite(given, checkpoint.path)
    module.load_state_dict(
        {
            name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor
            for name, tensor in given.items()
        },
        assign=any(tensor.is_meta for tensor in own.values()),  # nothing can be copied to the meta device
    )


def read_pt2(path: Path, *, trust_pickle: bool) -> tuple[nn.Module, Example, str]:
    """A program that torch.export.save wrote, as a module, with the example inputs it came with, and its sha256.

    torch's own loader reads the file, and like code such a file is for those whose author you trust.

    Raises:
        CheckpointError: it is none, or holds no example inputs.
    """
    if not os.path.isfile(path):  # noqa: PTH113 - unlike Path.is_file, it raises for no name whatever
        raise CheckpointError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: is not what torch.export.save writes: no zip archive. Save it again")
    try:
        with quiet_torch(), _only_weights(trust_pickle):
            program = torch.export.load(path)
            module = program.module()
    except Exception as error:  # torch's loader raises whatever it stumbles over
        raise CheckpointError(
            f"{path}: torch.export.load cannot read it: {type(error).__name__}: {error!s:.300}. Save it again with the "
            f"torch in use, {torch.__version__}"
        ) from error
    _refuse_static(program, path)
    if program.example_inputs is None:
        raise CheckpointError(f"{path}: holds no example inputs. Give some with --example-input F.npz")
    positional, keywords = program.example_inputs
    if len(positional) == 1 and not keywords and isinstance(positional[0], Mapping):
        return module, positional[0], _sha256(path)
    if keywords and not positional:
        return module, dict(keywords), _sha256(path)
    if keywords or not all(isinstance(value, Tensor) for value in positional):
        raise CheckpointError(
            f"{path}: its inputs are neither tensors nor one dict of tensors. Export the module itself, with --model"
        )
    return module, tuple(positional), _sha256(path)


def _refuse_static(program: ExportedProgram, path: Path) -> None:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.name in program.graph_signature.user_inputs and isinstance(value, Tensor):
            batch: object = value.shape[0] if value.ndim else None
            if not isinstance(batch, torch.SymInt):
                raise CheckpointError(
                    f"{path}: the batch axis of its input {node.name!r} is fixed ({tuple(value.shape)}), so it answers that "
                    "many rows alone. Save it with a dynamic one: torch.export.export(module, (x,), dynamic_shapes=({0: "
                    "torch.export.Dim('batch')},))"
                )


def _failed(error: BaseException, what: str) -> str:
    where = line_of_error(error)
    return f"{what} fails with {type(error).__name__}: {error!s:.300}{f' ({where})' if where else ''}"


def _refuse_nonfinite(state: Mapping[str, Tensor], path: Path) -> None:
    bad = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        raise CheckpointError(
            f"{path}: {len(bad)} tensors hold NaN or infinity: {', '.join(bad[:_SHOWN])}. The training diverged before this "
            "checkpoint was saved; export an earlier one."
        )


@contextmanager
def _importing_from_here() -> Iterator[None]:
    """As `python -m` does: modules in the folder where the command is run are found."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


@contextmanager
def _only_weights(trust_pickle: bool) -> Iterator[None]:
    """torch's loader falls back to running pickled code unless it is told not to."""
    before = os.environ.get(_FORCE_SAFE)
    if not trust_pickle:
        os.environ[_FORCE_SAFE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_FORCE_SAFE, None)
        else:
            os.environ[_FORCE_SAFE] = before


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()

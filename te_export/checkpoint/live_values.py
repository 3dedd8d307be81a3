"""Opens values that are real Python objects: what --trust-pickle or the safetensors library gave."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Mapping

import torch

from te_export.checkpoint.storages import DTYPES
from te_export.checkpoint.values import (
    Module,
    ModuleContents,
    Other,
    Record,
    Scalar,
    Sequence,
    Table,
    TensorValue,
    Value,
)
from te_export.errors import CheckpointError

__all__ = ["open_live"]

_SCALARS = (bool, int, float, str)  # and not numpy.float64 or another subclass
_WRAPPERS = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)


def open_live(value: object) -> Value:
    """Open one level of a real object."""
    if value is None or (isinstance(value, bool | int | float | str) and type(value) in _SCALARS):
        return Scalar(value)
    if isinstance(value, torch.Tensor):
        return TensorValue(lambda: _dense_cpu(value))
    if isinstance(value, torch.nn.Module):
        return Module(type(value).__name__, lambda: _read_module(value))
    if isinstance(value, Mapping):
        return Table(dict(value))
    if isinstance(value, list | tuple):
        return Sequence(tuple(value))
    is_dataclass = dataclasses.is_dataclass(value) and not isinstance(value, type)
    if is_dataclass or isinstance(value, argparse.Namespace | types.SimpleNamespace):
        return Record(type(value).__name__, dict(vars(value)))
    return Other(f"a {type(value).__name__}")


def _dense_cpu(tensor: torch.Tensor) -> torch.Tensor:
    if (
        tensor.layout != torch.strided
        or tensor.is_quantized
        or tensor.is_meta
        or tensor.dtype not in DTYPES.values()
    ):
        raise CheckpointError(
            f"is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, expected a dense one of "
            f"{', '.join(DTYPES)}"
        )
    return tensor.detach().cpu()


def _read_module(module: torch.nn.Module) -> ModuleContents:
    notes: list[str] = []
    while isinstance(module, _WRAPPERS):
        notes.append(f"the model was taken out of a {type(module).__name__}")
        module = module.module
    return ModuleContents(
        class_name=type(module).__name__,
        state=dict(module.state_dict()),
        layer_types={path: type(each).__name__ for path, each in module.named_modules()},
        attributes={name: value for name, value in vars(module).items() if not name.startswith("_")},
        notes=tuple(notes),
    )

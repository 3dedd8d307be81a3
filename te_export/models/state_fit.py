"""Whether a state dict can fill a model: names, shapes, dtypes and values, with every fault named."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from te_export.checkpoint.contents import ConfigValue
from te_export.errors import CheckpointError

__all__ = [
    "fill",
    "has_parts",
    "require_agreement",
    "require_finite",
    "require_fit",
    "require_floats",
    "require_layers",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHUNK = 2**24
_SHOWN = 20


def has_parts(
    state: Mapping[str, Tensor], own: re.Pattern[str], parts: Collection[str], *, others: Collection[str]
) -> bool:
    """Whether the names that match `own` begin with exactly `parts`, and no name begins with a part of `others`."""
    found = {name.split(".")[0] for name in state if own.match(name)}
    return found == set(parts) and not {name.split(".")[0] for name in state} & set(others)


def require_floats(state: Mapping[str, Tensor]) -> list[str]:
    """Notes on what will be converted to float32.

    Raises:
        CheckpointError: a tensor holds integers, booleans, complex or quantized numbers.
    """
    odd = [name for name, tensor in state.items() if tensor.dtype not in _FLOATS]
    if odd:
        found = ", ".join(sorted({str(state[name].dtype) for name in odd}))
        raise CheckpointError(
            f"{len(odd)} tensors have dtype {found}, expected float32, float64, float16 or bfloat16: "
            f"{', '.join(odd[:5])}. Export from the unquantized checkpoint."
        )
    other = sorted({str(t.dtype).removeprefix("torch.") for t in state.values() if t.dtype != torch.float32})
    return [f"{' and '.join(other)} weights were converted to float32"] if other else []


def require_agreement(
    found: Mapping[str, ConfigValue], read: Mapping[str, ConfigValue], source: str | None
) -> None:
    """Compare a config from a file with the sizes read off the tensors.

    Raises:
        CheckpointError: they differ, with both values of each.
    """
    conflicts = [
        f"{name}: {_listed(found[name])} in {source}, {_listed(value)} by the tensors"
        for name, value in read.items()
        if found.get(name) is not None and found[name] != value
    ]
    if conflicts:
        raise CheckpointError(
            "the config in the file and its tensors disagree:\n  " + "\n  ".join(conflicts) + "\n"
            "Save the checkpoint again with the config it was trained with."
        )


def require_fit(state: Mapping[str, Tensor], model: nn.Module, *, what: str) -> None:
    """Compare names and shapes with a model's.

    Args:
        model: may be on the meta device.
        what: the model, and where its sizes are from, for the message.

    Raises:
        CheckpointError: listing every missing, unexpected and misshaped tensor, with the nearest name.
    """
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    problems = [f"missing    {name} {expected[name]}{_nearest(name, extra)}" for name in missing]
    problems += [f"unexpected {name} {found[name]}{_nearest(name, missing)}" for name in extra]
    problems += [
        f"misshaped  {name}: expected {shape}, found {found[name]}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        count = len(problems)
        raise CheckpointError(
            f"{count} {'tensor does' if count == 1 else 'tensors do'} not fit {what}:\n  "
            + "\n  ".join(_first(problems))
            + "\nSave the whole model.state_dict() of one such model, under its own parameter names."
        )


def require_layers(layer_types: Mapping[str, str], model: nn.Module) -> None:
    """Compare the layers a pickled module names with a model's: another layer could change every number.

    Args:
        layer_types: module path to class name; empty where the file holds tensors only.

    Raises:
        CheckpointError: a layer is of another class, is missing, or is one too many.
    """
    expected = {path: type(module).__name__ for path, module in model.named_modules() if path}
    odd = [
        f"{path} is {layer_types.get(path, 'missing')}, expected {expected.get(path, 'no such layer')}"
        for path in dict.fromkeys([*expected, *layer_types])
        if path and layer_types and layer_types.get(path) != expected.get(path)
    ]
    if odd:
        raise CheckpointError(
            f"the pickled module has other layers than {type(model).__name__}:\n  "
            + "\n  ".join(_first(odd))
            + "\nExport such a module from Python instead: te_export.export(module, …)."
        )


def require_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse values that are NaN or infinite in float32, which is what will be exported.

    Raises:
        CheckpointError: naming the tensors, with the counts.
    """
    bad = []
    for name, tensor in state.items():
        nans, infs = _count_nonfinite(tensor)
        if nans or infs:
            bad.append(f"{name}: {nans} NaN and {infs} infinite of {tensor.numel()}")
    if bad:
        raise CheckpointError(
            f"{len(bad)} tensors hold values that are NaN or infinite in float32:\n  "
            + "\n  ".join(_first(bad))
            + "\nThe training diverged before this checkpoint was saved; export an earlier one."
        )


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model (on the meta device) its weights in float32, in eval mode and without gradients; those that
    are float32 already are not copied.
    """
    weights = {name: tensor.to(torch.float32).contiguous() for name, tensor in state.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.eval().requires_grad_(False)


def _first(lines: list[str]) -> list[str]:
    return [*lines[:_SHOWN], f"… and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else lines


def _nearest(name: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(name, candidates[:_SHOWN], n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""


def _count_nonfinite(tensor: Tensor) -> tuple[int, int]:
    nans = infs = 0
    for chunk in torch.split(tensor.reshape(-1), _CHUNK):
        single = chunk.to(torch.float32)  # a float64 beyond its range is infinite there
        if not bool(torch.isfinite(single).all()):
            nans += int(torch.isnan(single).sum())
            infs += int(torch.isinf(single).sum())
    return nans, infs


def _listed(value: ConfigValue) -> object:
    return list(value) if isinstance(value, tuple) else value

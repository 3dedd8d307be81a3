"""A float64 evaluation of a module as it is, independent of the one that te_export has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from library_model import Inputs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["evaluate_float64"]


class _NothingNarrower(TorchDispatchMode):
    """A forward that says `.float()` asks for float32; here it gets float64."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@torch.no_grad()
def evaluate_float64(module: nn.Module, inputs: Inputs, call: Callable[[nn.Module, Inputs], Any]) -> Any:
    """What `call` gives for a float64 copy of the module and float64 inputs."""
    copied = copy.deepcopy(module).double()
    rows = {name: _wide(t) for name, t in inputs.items()} if isinstance(inputs, dict) else _wide(inputs)
    with _NothingNarrower():
        return call(copied, rows)

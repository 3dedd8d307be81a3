"""The oracle: the same torch module, evaluated in float64 without a float64 copy of its weights.

Every torch function that is given float64 and float32 tensors together gets the float32 ones widened for
that one call, so memory grows by one layer's weights and not by the model's. Widening float32 to float64 is
exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["evaluate_float32", "evaluate_float64"]

_ROWS_AT_ONCE = 64


class _WidenToFloat64(TorchFunctionMode):
    """Runs each torch function in float64 where any of its tensor arguments is float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        tensors = [
            value
            for value in torch.utils._pytree.tree_leaves((args, kwargs or {}))
            if isinstance(value, Tensor)
        ]
        if {torch.float32, torch.float64} <= {tensor.dtype for tensor in tensors}:
            args, kwargs = torch.utils._pytree.tree_map(_widen, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _widen(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


@torch.no_grad()
def evaluate_float64(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The oracle's outputs: `module` on x (B, …), any float dtype, computed in float64 throughout.

    Raises:
        RuntimeError: some output came out in another dtype, so part of the module did not run in float64.
    """
    with _WidenToFloat64():
        outputs: tuple[Tensor, ...] = module(x.double())
    for index, output in enumerate(outputs):
        if output.dtype != torch.float64:
            raise RuntimeError(f"output {index} of the oracle is {output.dtype}, expected float64")
    return outputs


@torch.no_grad()
def evaluate_float32(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """What torch itself answers: `module` on x (B, …) float32, in batches of 64 rows."""
    parts = [module(rows) for rows in torch.split(x, _ROWS_AT_ONCE)]
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

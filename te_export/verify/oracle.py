"""The oracle: the same torch module, evaluated in float64 without a float64 copy of its weights.

Every torch function that is given float32 tensors gets them widened for that one call, so memory grows by one layer's
weights and not by the model's. Widening float32 to float64 is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from te_export.models.input_rows import InputRows
from te_export.verify.rounding_scale import rounding_scale

__all__ = [
    "UNIT_ROUNDOFF",
    "evaluate_float32",
    "evaluate_float64",
    "evaluate_with_rounding_noise",
    "in_float64",
]

UNIT_ROUNDOFF = 2.0**-24
"""Half a unit in the last place of float32: the largest relative error of one correctly rounded operation."""


class _WidenToFloat64(TorchFunctionMode):
    """Runs each torch function on float64 copies of its float32 arguments."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if any(map(_is_single, pytree.tree_leaves((args, kwargs)))):
            args, kwargs = pytree.tree_map(_widen, (args, kwargs))
        return self.finish(func, args, func(*args, **kwargs))

    def finish(self, _func: Callable[..., Any], _args: tuple[Any, ...], result: Any) -> Any:
        """What the function's caller gets."""
        return result


class _RoundingNoise(_WidenToFloat64):
    """Adds to every result the error that float32 would be expected to make there: Monte Carlo arithmetic (Parker
    1997), with errors of the size that verify/rounding_scale.py gives.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def finish(self, func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> Any:
        if isinstance(result, tuple) and result and isinstance(result[0], Tensor):
            return (self._noisy(func, args, result[0]), *result[1:])
        return self._noisy(func, args, result) if isinstance(result, Tensor) else result

    def _noisy(self, func: Callable[..., Any], args: tuple[Any, ...], result: Tensor) -> Tensor:
        scale = rounding_scale(func, args, result) if result.dtype == torch.float64 else None
        if scale is None:
            return result
        signs = torch.rand(result.shape, generator=self._generator, dtype=torch.float64).mul_(2.0).sub_(1.0)
        return result + signs.mul_(scale).mul_(UNIT_ROUNDOFF)


def _is_single(value: object) -> bool:
    """Whether it is a float32 tensor, or asks for one, as softmax(x, dtype=torch.float32) does: the oracle stays in
    float64.
    """
    return value is torch.float32 or (isinstance(value, Tensor) and value.dtype == torch.float32)


def _widen(value: object) -> object:
    if isinstance(value, Tensor):
        return _wide(value)
    return torch.float64 if value is torch.float32 else value


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype == torch.float32 else tensor


@contextmanager
def in_float64(rows: InputRows) -> Iterator[tuple[Tensor, ...]]:
    """While open, torch computes with rows, given as tensors of float64, in float64."""
    tensors = tuple(_wide(tensor) for tensor in rows.tensors())
    with _WidenToFloat64():
        yield tensors


@torch.no_grad()
def _evaluate(module: nn.Module, rows: InputRows, mode: _WidenToFloat64) -> list[NDArray[np.float64]]:
    tensors = [_wide(tensor) for tensor in rows.tensors()]
    with mode:
        outputs: tuple[Tensor, ...] = module(*tensors)
    for index, output in enumerate(outputs):
        if output.dtype != torch.float64:
            raise RuntimeError(f"output {index} of the oracle is {output.dtype}, expected float64")
    return [output.numpy() for output in outputs]


def evaluate_float64(module: nn.Module, rows: InputRows) -> list[NDArray[np.float64]]:
    """The oracle's outputs: `module` on rows whose floats are float32, computed in float64 throughout.

    Raises:
        RuntimeError: some output came out in another dtype, so part of the module did not run in float64.
    """
    return _evaluate(module, rows, _WidenToFloat64())


def evaluate_with_rounding_noise(module: nn.Module, rows: InputRows, seed: int) -> list[NDArray[np.float64]]:
    """The oracle's outputs, with noise of the size of float32's roundings added after every operation."""
    return _evaluate(module, rows, _RoundingNoise(seed))


@torch.no_grad()
def evaluate_float32(
    module: nn.Module, rows: InputRows, planned: Sequence[NDArray[np.int64]]
) -> list[NDArray[np.float32]]:
    """What torch itself answers: `module` on the planned batches of rows, one after another.

    Returns:
        Each output over the concatenated batches.
    """
    parts = [module(*rows[batch].tensors()) for batch in planned]
    return [torch.cat(columns).numpy() for columns in zip(*parts, strict=True)]

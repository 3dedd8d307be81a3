"""How large the error of one operation in float32 is expected to be, as a multiple of the unit roundoff u.

Elementwise operations err by up to u·|y|. A sum of n products errs by about u·‖x‖·‖w‖ where roundings have random
signs (Higham and Mary 2019), and by a quarter of that in kernels that sum in 16 or more lanes side by side, as all
products of today do; a plain sum of n terms errs by about u·‖x‖. A normalization by stored statistics,
y = (x - μ)·g + β, may be computed as x·g + (β - μ·g).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["operator_name", "rounding_scale"]

_LANES_FACTOR = 0.25
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_PRODUCTS = frozenset({"matmul", "mm", "bmm", "mv"})
_PRODUCTS_AND_SUMMAND = frozenset({"addmm", "baddbmm"})
_SUMS = frozenset({"sum", "mean"})
_NORMALIZATIONS = frozenset({"_native_batch_norm_legit_no_training"})
_EXACT = frozenset(
    {
        "relu",
        "stack",
        "cat",
        "flatten",
        "reshape",
        "view",
        "unsqueeze",
        "squeeze",
        "permute",
        "transpose",
        "select",
    }
    | {
        "slice",
        "clone",
        "expand",
        "embedding",
        "max_pool2d",
        "getitem",
        "split",
        "t",
        "dropout",
        "alias",
        "where",
    }
)
"""Functions that only move or drop values round nothing."""


def operator_name(func: Callable[..., Any]) -> str:
    """The name of a torch function, or of an ATen operator without its overload."""
    return str(getattr(getattr(func, "overloadpacket", func), "__name__", func))


def rounding_scale(func: Callable[..., Any], args: Sequence[Any], result: Tensor) -> Tensor | None:
    """The expected error over u of each element of a result; None where there is none."""
    name = operator_name(func)
    if name in _EXACT:
        return None
    scale = result.abs()
    if name in _NORMALIZATIONS:
        return scale + _normalization(args)
    if name in _SUMS:
        return scale + _sum_norms(name, func, args, result)
    norms = _product_norms(name, func, args)
    return scale if norms is None else scale + _LANES_FACTOR * norms.reshape(result.shape)


def _product_norms(name: str, func: Callable[..., Any], args: Sequence[Any]) -> Tensor | None:
    """‖x‖·‖w‖ over what each element of a product sums up; None for anything else."""
    if name == "linear":
        return _norms(args[0], -1) * _norms(args[1], -1).reshape(-1)  # (…, 1) · (out,), or (1,) of a vector
    if name in _CONVOLUTIONS:
        x, weight = args[0], args[1]
        norms = _norms(weight.flatten(1), 1)
        patches: Tensor = func(x.square(), torch.ones_like(weight), None, *args[3:])
        return patches.sqrt() * norms.reshape(-1, *(1 for _ in weight.shape[2:]))
    if name in _PRODUCTS or name in _PRODUCTS_AND_SUMMAND:
        a, b = args[1:3] if name in _PRODUCTS_AND_SUMMAND else args[:2]
        return _norms(a, -1) * _norms(b, -2 if b.ndim > 1 else -1)
    if name == "einsum" and len(args[1]) == 2:
        equation, (a, b) = args
        left: Tensor = func(equation, [a.square(), torch.ones_like(b)])
        right: Tensor = func(equation, [torch.ones_like(a), b.square()])
        return (left * right).sqrt()
    return None


def _sum_norms(name: str, func: Callable[..., Any], args: Sequence[Any], result: Tensor) -> Tensor | float:
    """‖x‖ over what each element of a sum adds up; of a mean, over their number. Nothing where the axes are not among
    the arguments in order.
    """
    x, *axes = args
    squares: Tensor = func(x.square(), *axes)
    if squares.shape != result.shape:
        return 0.0
    return squares.sqrt() if name == "sum" else (squares * result.numel() / x.numel()).sqrt()


def _norms(x: Tensor, axis: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=axis, keepdim=True)
    return norms


def _normalization(args: Sequence[Any]) -> Tensor:
    """|x·g| + |μ·g|, the terms that y is the difference of."""
    x, weight, _, mean, variance, _, epsilon = args
    gain = (variance + epsilon).rsqrt()
    gain = gain if weight is None else gain * weight
    columns = (1, -1, *(1 for _ in x.shape[2:]))
    size: Tensor = (x * gain.reshape(columns)).abs() + (mean * gain).abs().reshape(columns)
    return size

"""How large the error of one operation in float32 is expected to be, as a multiple of the unit roundoff u.

Elementwise operations err by up to u·|y|. A sum of n products errs by about u·‖x‖·‖w‖ where roundings have random
signs (Higham and Mary 2019), and by a quarter of that in kernels that sum in 16 or more lanes side by side, as all
of today's do. A normalization by stored statistics, y = (x - μ)·g + β, may be computed as x·g + (β - μ·g).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["operator_name", "rounding_scale"]

_LANES_FACTOR = 0.25
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_PRODUCTS = frozenset({"matmul", "mm", "bmm"})
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
    norms = _product_norms(name, func, args)
    return scale if norms is None else scale + _LANES_FACTOR * norms


def _product_norms(name: str, func: Callable[..., Any], args: Sequence[Any]) -> Tensor | None:
    """‖x‖·‖w‖ over what each element of a product sums up; None for anything else."""
    if name == "linear":
        return _norms(args[0], -1) * _norms(args[1], 1).reshape(-1)  # (…, 1) · (out,)
    if name in _CONVOLUTIONS:
        x, weight = args[0], args[1]
        norms = _norms(weight.flatten(1), 1)
        patches: Tensor = func(x.square(), torch.ones_like(weight), None, *args[3:])
        return patches.sqrt() * norms.reshape(-1, *(1 for _ in weight.shape[2:]))
    if name in _PRODUCTS and args[0].ndim > 1 and args[1].ndim > 1:
        return _norms(args[0], -1) * _norms(args[1], -2)
    if name == "einsum" and len(args[1]) == 2:
        equation, (a, b) = args
        left: Tensor = func(equation, [a.square(), torch.ones_like(b)])
        right: Tensor = func(equation, [torch.ones_like(a), b.square()])
        return (left * right).sqrt()
    return None


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

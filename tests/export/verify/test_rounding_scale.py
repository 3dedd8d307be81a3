"""Each operator's expected error against what float32 really errs by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from te_export.verify.oracle import UNIT_ROUNDOFF
from te_export.verify.rounding_scale import operator_name, rounding_scale

aten = torch.ops.aten
ABOVE, BELOW = 4.0, 40.0
"""How far, as a root mean square, the true error may lie above the expected one and below it. Kernels that sum in more
lanes than 16 err less; torch sums rows pairwise, which errs less still."""

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, W, B = randn(64, 300), randn(50, 300, seed=1), randn(50, seed=2)
IMAGES, KERNELS = randn(4, 8, 12, 12), randn(16, 8, 3, 3, seed=1)
BATCHED, MATRICES = randn(6, 20, 100), randn(6, 100, 30, seed=1)

OPERATORS: dict[str, Case] = {
    "linear": (aten.linear.default, (X, W, B)),
    "linear without a bias": (aten.linear.default, (X, W)),
    "linear of three axes": (aten.linear.default, (X.reshape(4, 16, 300), W, B)),
    "torch's linear": (F.linear, (X, W, B)),
    "conv1d": (aten.conv1d.default, (randn(4, 8, 50), randn(16, 8, 5, seed=1), None)),
    "conv2d": (aten.conv2d.default, (IMAGES, KERNELS, randn(16, seed=2))),
    "conv2d in strides": (aten.conv2d.default, (IMAGES, KERNELS, None, [2, 2], [1, 1])),
    "conv2d by groups": (aten.conv2d.default, (IMAGES, randn(16, 2, 3, 3, seed=1), None, [1, 1], [1, 1], [1, 1], 4)),
    "matmul": (aten.matmul.default, (X, W.t())),
    "matmul with a batch": (aten.matmul.default, (BATCHED, MATRICES)),
    "mm": (aten.mm.default, (X, W.t())),
    "bmm": (aten.bmm.default, (BATCHED, MATRICES)),
    "addmm": (aten.addmm.default, (B, X, W.t())),
    "matmul by a vector": (aten.matmul.default, (X, W[0])),
    "mv": (aten.mv.default, (X, W[0])),
    "einsum": (aten.einsum.default, ("bkd,dh->bkh", [BATCHED, randn(100, 30, seed=1)])),
    "einsum of experts": (aten.einsum.default, ("bd,kde->bke", [randn(20, 100), MATRICES])),
    "einsum of an ellipsis": (aten.einsum.default, ("...d,de->...e", [BATCHED, randn(100, 30, seed=1)])),
    "sum": (aten.sum.dim_IntList, (X, [1])),
    "sum of a middle axis, kept": (aten.sum.dim_IntList, (BATCHED, [1], True)),
    "mean": (aten.mean.dim, (X, [1])),
    "mean of two axes": (aten.mean.dim, (IMAGES, [2, 3])),
    "batch norm": (
        aten._native_batch_norm_legit_no_training.default,
        (X, randn(300, seed=1), randn(300, seed=2), 10 * randn(300, seed=3), randn(300, seed=4).abs() + 0.5, 0.1, 1e-5),
    ),
    "add": (aten.add.Tensor, (X, randn(64, 300, seed=5))),
    "mul": (aten.mul.Tensor, (X, randn(64, 300, seed=5))),
    "div": (aten.div.Tensor, (X, randn(64, 300, seed=5))),
    "sigmoid": (aten.sigmoid.default, (X,)),
    "tanh": (aten.tanh.default, (X,)),
    "softmax": (aten.softmax.int, (X[:, :8], 1)),
    "layer norm": (aten.layer_norm.default, (X, [300])),
}  # fmt: skip
HALF, SIDE = randn(64, 150), randn(50, 150, seed=1)
TERMS = torch.cat([HALF, -HALF * (1 + 1e-4 * randn(64, 150, seed=2))], 1)
"""Rows whose second half takes back what the first gave: sums of them are a ten-thousandth of their terms."""
TWICE = torch.cat([SIDE, SIDE], 1)
CANCELLING: dict[str, Case] = {
    "linear": (aten.linear.default, (TERMS, TWICE, None)),
    "conv1d": (aten.conv1d.default, (TERMS.unsqueeze(1), TWICE.unsqueeze(1), None)),
    "matmul": (aten.matmul.default, (TERMS, TWICE.t())),
    "matmul by a vector": (aten.matmul.default, (TERMS, TWICE[0])),
    "matmul of a vector": (aten.matmul.default, (TERMS[0], TWICE.t())),
    "mv": (aten.mv.default, (TERMS, TWICE[0])),
    "mm": (aten.mm.default, (TERMS, TWICE.t())),
    "addmm": (aten.addmm.default, (torch.zeros(50), TERMS, TWICE.t())),
    "bmm": (aten.bmm.default, (TERMS.unsqueeze(0), TWICE.t().unsqueeze(0))),
    "baddbmm": (
        aten.baddbmm.default,
        (torch.zeros(1, 64, 50), TERMS.unsqueeze(0), TWICE.t().unsqueeze(0)),
    ),
    "einsum": (aten.einsum.default, ("bd,hd->bh", [TERMS, TWICE])),
    "sum": (aten.sum.dim_IntList, (TERMS, [1])),
    "sum, kept": (aten.sum.dim_IntList, (TERMS, [-1], True)),
    "sum of everything": (aten.sum.default, (TERMS[:1],)),
    "mean": (aten.mean.dim, (TERMS, [1])),
}


def widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    return [widened(part) for part in value] if isinstance(value, list) else value


def first(value: Any) -> Tensor:
    found = value[0] if isinstance(value, tuple) else value
    assert isinstance(found, Tensor)
    return found


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


@pytest.mark.parametrize("name", OPERATORS)
def test_float32_errs_by_about_what_is_expected(name: str) -> None:
    func, arguments = OPERATORS[name]
    wide = tuple(widened(argument) for argument in arguments)
    exact = first(func(*wide))
    error = rms(first(func(*arguments)).double() - exact)

    scale = rounding_scale(func, wide, exact)

    assert scale is not None
    expected = rms(scale.expand_as(exact)) * UNIT_ROUNDOFF
    assert expected / BELOW <= error <= ABOVE * expected


@pytest.mark.parametrize("name", CANCELLING)
def test_terms_that_cancel_leave_their_error(name: str) -> None:
    func, arguments = CANCELLING[name]
    wide = tuple(widened(argument) for argument in arguments)
    exact = first(func(*wide))
    error = rms(first(func(*arguments)).double() - exact)

    scale = rounding_scale(func, wide, exact)

    assert scale is not None
    assert error <= ABOVE * rms(scale.expand_as(exact)) * UNIT_ROUNDOFF


@pytest.mark.parametrize("name", OPERATORS)
def test_the_scale_has_a_number_for_each_of_the_results(name: str) -> None:
    func, arguments = OPERATORS[name]
    wide = tuple(widened(argument) for argument in arguments)
    exact = first(func(*wide))

    scale = rounding_scale(func, wide, exact)

    assert scale is not None
    assert torch.broadcast_shapes(scale.shape, exact.shape) == exact.shape
    assert bool((scale >= 0).all())
    assert bool((scale >= exact.abs() * (1 - 1e-12)).all())


@pytest.mark.parametrize(
    ("func", "arguments"),
    [
        (aten.relu.default, (X,)),
        (aten.stack.default, ([X, X], 1)),
        (aten.cat.default, ([X, X], 1)),
        (aten.view.default, (X, [-1])),
        (aten.slice.Tensor, (X, 1, 0, 3)),
        (aten.select.int, (X, 1, 0)),
        (aten.unsqueeze.default, (X, 1)),
        (aten.clone.default, (X,)),
        (aten.embedding.default, (W, torch.tensor([1, 2]))),
        (aten.where.self, (X > 0, X, -X)),
        (aten.max_pool2d.default, (IMAGES, [2, 2])),
    ],
)
def test_what_only_moves_numbers_rounds_nothing(func: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    wide = tuple(widened(argument) if argument is not arguments[-1] else argument for argument in arguments)
    result = first(func(*arguments)).double()

    assert rounding_scale(func, wide, result) is None


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (F.linear, "linear"),
        (aten.linear.default, "linear"),
        (aten.sum.dim_IntList, "sum"),
        (torch.relu, "relu"),
    ],
)
def test_an_operator_and_its_function_have_one_name(func: Callable[..., Any], name: str) -> None:
    assert operator_name(func) == name

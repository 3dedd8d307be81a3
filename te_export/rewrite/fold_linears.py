"""A linear layer right after a linear layer is one linear layer.

    h = x·W1ᵀ + b1                        y_i = x·(W2_i·W1)ᵀ + (W2_i·b1 + b2_i)
    y_i = h·W2_iᵀ + b2_i   for every i    (h is gone)

The products are computed in float64 and rounded once, so the folded layer rounds less than the two did.
Only where every graph that holds a part of the pattern then multiplies less: with n inputs, m = width of h
and s outputs, n·s < n·m + m·s. That is linear in s, so where it holds for all readers it holds for some.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from te_export.rewrite.edit import Edit
from te_export.rewrite.linear import Linear, read_linear, tensor_of
from te_export.rewrite.log import Applied, Declined, Findings

__all__ = ["RULE", "fold_linears"]

RULE = "fold_linears"


@dataclass(frozen=True)
class _Match:
    first: ir.Node
    readers: tuple[ir.Node, ...]


@dataclass(frozen=True)
class _Fold:
    first: Linear
    readers: tuple[Linear, ...]
    products: tuple[tuple[NDArray[np.float32], NDArray[np.float32]], ...]


def fold_linears(graph: ir.Graph) -> Findings:
    """Fold every pair of linear layers that gets cheaper by it, in place."""
    applied: list[Applied] = []
    declined: list[Declined] = []
    sources: dict[str, tuple[str, ...]] = {}
    for node in list(graph):
        match = _match(node)
        if match is None:
            continue
        checked = _check(match)
        if isinstance(checked, str):
            declined.append(Declined(RULE, str(node.name), checked))
        else:
            sources |= _rewrite(graph, checked)
            applied.append(Applied(RULE, str(node.name), _what(checked)))
    return Findings(tuple(applied), tuple(declined), sources)


def _match(node: ir.Node) -> _Match | None:
    if node.op_type != "Gemm":
        return None
    uses = tuple(node.outputs[0].uses())
    if not any(use.node.op_type == "Gemm" and use.idx == 0 for use in uses):
        return None
    return _Match(node, tuple(dict.fromkeys(use.node for use in uses)))


def _check(match: _Match) -> _Fold | str:
    first = read_linear(match.first)
    if isinstance(first, str):
        return first
    if first.y.is_graph_output():
        return f"its output {first.y.name} leaves the graph"
    readers = []
    for node in match.readers:
        reader = read_linear(node)
        if isinstance(reader, str):
            return f"its output is also read by {node.name}: {reader}"
        readers.append(reader)
    width = sum(reader.width_out for reader in readers)
    apart = first.width_in * first.width_out + first.width_out * width
    if first.width_in * width >= apart:
        return (
            f"folded into the {len(readers)} layers that read it, it would take {first.width_in * width:,} "
            f"multiply-adds instead of {apart:,}"
        )
    products = tuple(_product(first, reader) for reader in readers)
    if not all(np.isfinite(values).all() for product in products for values in product):
        return "the product of the weights passes the largest float32"
    return _Fold(first, tuple(readers), products)


def _product(first: Linear, reader: Linear) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """W2·W1 (out, in) and W2·b1 + b2 (out,), in float64, rounded once."""
    w1, w2 = first.weight_out_in().astype(np.float64), reader.weight_out_in().astype(np.float64)
    bias = np.zeros(reader.width_out)
    if first.bias is not None:
        bias += w2 @ tensor_of(first.bias).numpy().astype(np.float64)
    if reader.bias is not None:
        bias += tensor_of(reader.bias).numpy().astype(np.float64)
    with np.errstate(over="ignore"):  # _check looks for infinities
        return (w2 @ w1).astype(np.float32), bias.astype(np.float32)


def _rewrite(graph: ir.Graph, fold: _Fold) -> dict[str, tuple[str, ...]]:
    edit = Edit(graph)
    sources: dict[str, tuple[str, ...]] = {}
    for reader, (weight, bias) in zip(fold.readers, fold.products, strict=True):
        kept = edit.initializer(ir.tensor(weight), name=f"{reader.weight.name}.folded")
        sources[str(kept.name)] = (str(reader.weight.name), str(fold.first.weight.name))
        shift = None
        if fold.first.bias is not None or reader.bias is not None:
            own = f"{reader.name}.bias" if reader.bias is None else str(reader.bias.name)
            shift = edit.initializer(ir.tensor(bias), name=f"{own}.folded")
            sources[str(shift.name)] = _bias_sources(fold.first, reader)
        inputs = [fold.first.x, kept] if shift is None else [fold.first.x, kept, shift]
        new = edit.add("Gemm", inputs, reader.axes, name=f"{reader.name}.folded", transB=1)
        edit.replace(reader.y, new)
    edit.done()
    return sources


def _bias_sources(first: Linear, reader: Linear) -> tuple[str, ...]:
    """W2·b1 + b2 takes the place of b1 and b2; W2 is in it too, but must be found in W2·W1."""
    return tuple(str(layer.bias.name) for layer in (reader, first) if layer.bias is not None)


def _what(fold: _Fold) -> str:
    first, width = fold.first, sum(reader.width_out for reader in fold.readers)
    saved = first.width_in * first.width_out + first.width_out * width - first.width_in * width
    return f"folded into the {len(fold.readers)} layers that read it, {saved:,} multiply-adds less"

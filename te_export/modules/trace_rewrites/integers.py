"""Integers that torch's exporter does not take as torch does.

div(a, b, rounding_mode="floor")      a // b                   it would divide as float32, wrong from 2^24 on
div(a, b, rounding_mode="trunc")      (a - fmod(a, b)) // b
x[i int64, j int32]                   x[i, j.long()]           it would compare their shapes as of two types
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from te_export.modules.trace import Traced
from te_export.modules.trace_rewrites.new_nodes import call

__all__ = ["keep_integers"]

_aten = torch.ops.aten
_ROUNDING = frozenset({_aten.div.Tensor_mode, _aten.div.Scalar_mode})


def keep_integers(traced: Traced) -> None:
    """Write such nodes as the exporter takes them rightly, in place."""
    for node in list(traced.graph.nodes):
        with traced.graph.inserting_before(node):
            if node.target in _ROUNDING and not node.meta["val"].is_floating_point():
                _divide_exactly(traced.graph, node)
            elif node.target is _aten.index.Tensor:
                _widen_indices(traced.graph, node)
    traced.graph.eliminate_dead_code()
    traced.program.graph_module.recompile()


def _divide_exactly(graph: Graph, node: Node) -> None:
    given: list[Any] = [*node.args]
    mode = node.kwargs.get("rounding_mode")
    dividend, divisor = given
    if mode not in ("floor", "trunc") or not isinstance(dividend, Node) or not _is_of(divisor, dividend):
        return
    if mode == "trunc":
        rest = call(
            graph, _aten.fmod.Tensor if isinstance(divisor, Node) else _aten.fmod.Scalar, dividend, divisor
        )
        dividend = call(graph, _aten.sub.Tensor, dividend, rest)
    node.replace_all_uses_with(call(graph, _aten.floor_divide.default, dividend, divisor))


def _widen_indices(graph: Graph, node: Node) -> None:
    source, indices = node.args
    assert isinstance(indices, list | tuple)  # the operator takes a list
    node.args = (source, [_widened(graph, index) if isinstance(index, Node) else index for index in indices])


def _widened(graph: Graph, index: Node) -> Node:
    narrow = index.meta["val"].dtype == torch.int32
    return call(graph, _aten._to_copy.default, index, dtype=torch.int64) if narrow else index


def _is_of(divisor: object, dividend: Node) -> bool:
    """Whether both are integers of one width."""
    if not isinstance(divisor, Node):
        return isinstance(divisor, int)
    one, other = divisor.meta["val"], dividend.meta["val"]
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype

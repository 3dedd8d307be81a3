"""Integers that torch's exporter does not take as torch does.

div(a, b, rounding_mode="floor")      a // b                   it would divide as float32, wrong from 2^24 on
div(a, b, rounding_mode="trunc")      (a - fmod(a, b)) // b
x[i int64, j int32]                   x[i, j.long()]           it would compare their shapes as of two types
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from te_export.modules.trace import Traced
from te_export.modules.trace_rewrites.new_nodes import call

__all__ = ["keep_integers"]

_aten = torch.ops.aten
_ROUNDING = frozenset({_aten.div.Tensor_mode, _aten.div.Scalar_mode})
_COMPARED: dict[object, Any] = {
    _aten.maximum.default: _aten.gt.Tensor,
    _aten.minimum.default: _aten.lt.Tensor,
}


def keep_integers(traced: Traced) -> None:
    """Write such nodes as the exporter takes them rightly, in place."""
    for node in list(traced.graph.nodes):
        with traced.graph.inserting_before(node):
            if node.target in _ROUNDING and not node.meta["val"].is_floating_point():
                _divide_exactly(traced.graph, node)
            elif node.target in _COMPARED and not node.meta["val"].is_floating_point():
                _choose_by_comparison(traced.graph, node)
            elif node.target is _aten.floor_divide.default and not isinstance(node.args[0], Node):
                number, divisor = node.args
                node.args = (call(traced.graph, _aten.full_like.default, divisor, number), divisor)
            elif node.target is _aten.index.Tensor:
                _widen_indices(traced.graph, node)
    traced.graph.eliminate_dead_code()
    traced.program.graph_module.recompile()


def _divide_exactly(graph: Graph, node: Node) -> None:
    mode, dtype = node.kwargs.get("rounding_mode"), node.meta["val"].dtype
    dividend, divisor = (_of_dtype(graph, part, dtype) for part in node.args)
    are_integers = isinstance(dividend, Node) and isinstance(divisor, Node | int) and dtype != torch.bool
    if mode not in ("floor", "trunc") or not are_integers:
        return
    if mode == "trunc":
        rest = call(
            graph, _aten.fmod.Tensor if isinstance(divisor, Node) else _aten.fmod.Scalar, dividend, divisor
        )
        dividend = call(graph, _aten.sub.Tensor, dividend, rest)
    node.replace_all_uses_with(call(graph, _aten.floor_divide.default, dividend, divisor))


def _choose_by_comparison(graph: Graph, node: Node) -> None:
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        return
    one, other = (_of_dtype(graph, part, dtype) for part in node.args)
    is_more = call(graph, _COMPARED[node.target], one, other)
    node.replace_all_uses_with(call(graph, _aten.where.self, is_more, one, other))


def _of_dtype(graph: Graph, value: Any, dtype: torch.dtype) -> Any:
    """An operand as torch promotes it."""
    if not isinstance(value, Node) or value.meta["val"].dtype == dtype:
        return value
    return call(graph, _aten._to_copy.default, value, dtype=dtype)


def _widen_indices(graph: Graph, node: Node) -> None:
    source, indices = node.args
    assert isinstance(indices, list | tuple)  # the operator takes a list
    node.args = (source, [_widened(graph, index) if isinstance(index, Node) else index for index in indices])


def _widened(graph: Graph, index: Node) -> Node:
    narrow = index.meta["val"].dtype == torch.int32
    return call(graph, _aten._to_copy.default, index, dtype=torch.int64) if narrow else index

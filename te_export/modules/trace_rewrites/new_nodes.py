"""Adding nodes to a traced graph, with the shapes and dtypes that a trace would have noted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

__all__ = ["call", "columns_side_by_side", "laid_out", "scores_of", "spread"]

_aten = torch.ops.aten


def call(graph: Graph, target: Any, *args: Any, **options: Any) -> Node:
    """A node of an operator, where the graph inserts now."""
    made = graph.call_function(target, args, options)
    made.meta["val"] = target(*torch.fx.node.map_arg(args, lambda node: node.meta["val"]), **options)
    return made


def laid_out(graph: Graph, node: Node, count: int) -> Node:
    """A value of so many numbers a row as (B, count)."""
    return node if node.meta["val"].ndim == 2 else call(graph, _aten.view.default, node, [-1, count])


def columns_side_by_side(graph: Graph, columns: Sequence[Node]) -> Node:
    """Values of one number a row as (B, K)."""
    return call(graph, _aten.cat.default, [laid_out(graph, column, 1) for column in columns], 1)


def spread(graph: Graph, weights: Node, index: Node, count: int) -> Node:
    """Weights (B, k) of the experts that an index (B, k) names, each in its expert's column: (B, count)."""
    scores = scores_of(index)
    if scores is not None:
        dtype = weights.meta["val"].dtype
        other = {} if scores.meta["val"].dtype == dtype else {"dtype": dtype}
        zeros = call(graph, _aten.zeros_like.default, scores, **other)
        return call(graph, _aten.scatter.src, zeros, 1, index, weights)
    columns = call(graph, _aten.one_hot.default, index, count)
    floats = call(graph, _aten._to_copy.default, columns, dtype=weights.meta["val"].dtype)
    terms = call(graph, _aten.mul.Tensor, call(graph, _aten.unsqueeze.default, weights, -1), floats)
    return call(graph, _aten.sum.dim_IntList, terms, [1])


def scores_of(index: Node) -> Node | None:
    """What topk chose an index (B, k) from, (B, K); None where it came about otherwise."""
    if getattr(index.target, "__name__", "") != "getitem" or index.args[1] != 1:
        return None
    top = index.args[0]
    given: list[Any] = [*top.args] if isinstance(top, Node) and top.target is _aten.topk.default else []
    if not given or (len(given) > 2 and given[2] not in (1, -1)):
        return None
    scores: Node = given[0]
    return scores if scores.meta["val"].ndim == 2 else None

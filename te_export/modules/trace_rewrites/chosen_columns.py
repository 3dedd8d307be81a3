"""Weights that a loop picks out expert by expert are columns of one value.

    v, i = topk(s (B, K), k)
    (v * (i == 0)).sum(1), (v * (i == 1)).sum(1), …      w = zeros(B, K).scatter(1, i, v);  w[:, 0], w[:, 1], …

where(i == 0, v, 0) in place of the product is the same. So a loop over experts is one node for all of them and not four for
each, and its weights are found as others are. It is exact: the index is k different numbers below K, since topk gave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from te_export.modules.trace import Traced
from te_export.modules.trace_rewrites.drop_zeros import is_zero
from te_export.modules.trace_rewrites.new_nodes import call, scores_of, spread

__all__ = ["join_chosen_columns"]

_aten = torch.ops.aten
_FEWEST = 2


@dataclass(frozen=True)
class _Column:
    """The weight of one expert.

    Attributes:
        node: (B,), or (B, 1) where `keeps_axis`.
        weights, index: (B, k), of the experts that a row chose.
        expert: which it is.
        count: K.
    """

    node: Node
    weights: Node
    index: Node
    expert: int
    count: int
    keeps_axis: bool


def join_chosen_columns(traced: Traced) -> None:
    """Make columns of one value where several experts' weights are picked out of the same, in place."""
    alike: dict[tuple[Node, Node], list[_Column]] = {}
    for column in _columns(traced):
        alike.setdefault((column.weights, column.index), []).append(column)
    for (weights, index), columns in alike.items():
        if len(columns) < _FEWEST:
            continue
        graph = traced.graph
        with graph.inserting_before(columns[0].node):
            whole = spread(graph, weights, index, columns[0].count)
            for column in columns:
                piece = call(graph, _aten.slice.Tensor, whole, 1, column.expert, column.expert + 1)
                column.node.replace_all_uses_with(
                    piece if column.keeps_axis else call(graph, _aten.squeeze.dim, piece, 1)
                )
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.program.graph_module.recompile()


def _columns(traced: Traced) -> Iterator[_Column]:
    for node in traced.graph.nodes:
        given: list[Any] = [*node.args]
        if node.target is not _aten.sum.dim_IntList or node.kwargs or given[1] not in ([1], [-1]):
            continue
        picked = _picked(given[0])
        if picked is None:
            continue
        weights, (index, expert) = picked
        count = _count(index)
        if (
            count is not None
            and isinstance(expert, int)
            and 0 <= expert < count
            and _form(weights) == _form(index) == _form(given[0])
            and weights.meta["val"].is_floating_point()
            and weights.meta["val"].dtype == node.meta["val"].dtype
        ):
            yield _Column(node, weights, index, expert, count, keeps_axis=len(given) > 2 and bool(given[2]))


def _picked(node: Node) -> tuple[Node, tuple[Node, object]] | None:
    """The weights, and the index and the expert that it is compared with, that a node multiplies or chooses by."""
    given: list[Any] = [*node.args]
    if node.target is _aten.mul.Tensor:
        for mask, weights in (given, given[::-1]):
            chosen = _comparison(mask)
            if chosen is not None and isinstance(weights, Node):
                return weights, chosen
    if node.target in (_aten.where.self, _aten.where.ScalarOther):
        chosen = _comparison(given[0])
        if chosen is not None and isinstance(given[1], Node) and is_zero(given[2]):
            return given[1], chosen
    return None


def _comparison(node: object) -> tuple[Node, object] | None:
    """index == expert, as it is or as floats."""
    while isinstance(node, Node) and node.target is _aten._to_copy.default:
        node = node.args[0]
    if not isinstance(node, Node) or node.target is not _aten.eq.Scalar:
        return None
    given: list[Any] = [*node.args]
    return given[0], given[1]


def _count(index: Node) -> int | None:
    """How many numbers topk chose an index from; None where no topk made it."""
    scores = scores_of(index)
    size = None if scores is None else scores.meta["val"].shape[1]
    return size if isinstance(size, int) else None


def _form(node: Node) -> tuple[str, ...]:
    return tuple(map(str, node.meta["val"].shape))

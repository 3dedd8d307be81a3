"""Adding nodes to a traced graph, with the shapes and dtypes that a trace would have noted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

__all__ = ["call", "columns_side_by_side", "laid_out"]

_aten = torch.ops.aten


def call(graph: Graph, target: Any, *args: Any) -> Node:
    """A node of an operator, where the graph inserts now."""
    made = graph.call_function(target, args)
    made.meta["val"] = target(*torch.fx.node.map_arg(args, lambda node: node.meta["val"]))
    return made


def laid_out(graph: Graph, node: Node, count: int) -> Node:
    """A value of so many numbers a row as (B, count)."""
    return node if node.meta["val"].ndim == 2 else call(graph, _aten.view.default, node, [-1, count])


def columns_side_by_side(graph: Graph, columns: Sequence[Node]) -> Node:
    """Values of one number a row as (B, K)."""
    return call(graph, _aten.cat.default, [laid_out(graph, column, 1) for column in columns], 1)

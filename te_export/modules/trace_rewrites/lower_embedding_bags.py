"""An EmbeddingBag over ids (B, L) as a lookup and a reduction, since ONNX could say it only as a loop over rows.

embedding_bag(W, view(ids, -1), arange(0, B·L, L), mode)     reduce(embedding(W, ids), over L)

`sum` adds, times each sample's weight where there are any; `mean` divides by how many ids are no padding; `max` looks at
those alone. A bag of nothing but padding gives zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from te_export.errors import CaptureError
from te_export.modules.blame import line_of_node
from te_export.modules.trace import Traced

__all__ = ["lower_embedding_bags"]

_aten = torch.ops.aten
_SUM, _MEAN, _MAX = range(3)
_FLATTENED = frozenset({_aten.view.default, _aten.reshape.default})


def lower_embedding_bags(traced: Traced) -> int:
    """Replace every EmbeddingBag in place; how many there were.

    Raises:
        CaptureError: one reads bags of its own lengths, by offsets.
    """
    bags = [node for node in traced.graph.nodes if node.target is _aten.embedding_bag.padding_idx]
    for node in bags:
        bag = _bag_of(node)
        with traced.graph.inserting_before(node):
            reduced = _Lowering(node).reduce(bag)
        for user in list(
            node.users
        ):  # only the first of what it gives is an answer, the rest is for training
            user.replace_all_uses_with(reduced)
            traced.graph.erase_node(user)
        traced.graph.erase_node(node)
    if bags:
        traced.graph.eliminate_dead_code()
        traced.graph.lint()
        traced.program.graph_module.recompile()
    return len(bags)


@dataclass(frozen=True)
class _Bag:
    """What one EmbeddingBag reads.

    Attributes:
        ids: (B, L).
        sample_weights: (B, L), or None.
        padding: the id that stands for none, or None.
    """

    table: Node
    ids: Node
    mode: int
    sample_weights: Node | None
    padding: int | None


def _bag_of(node: Node) -> _Bag:
    table, ids, offsets, _, mode, _, weights, includes_last, padding = node.args
    source = _rows_of(ids, offsets)
    weighed = _unflattened(weights) if isinstance(weights, Node) else None
    read = [reader for reader in node.users if reader.args[1] != 0 and reader.users]
    if (
        source is None
        or includes_last
        or read
        or not isinstance(table, Node)
        or not isinstance(mode, int)
        or (weights is not None and weighed is None)
    ):
        where = line_of_node(node)
        raise CaptureError(
            f"an EmbeddingBag reads bags of different lengths, by offsets{f' ({where})' if where else ''}: the first axis "
            "of every input must be the batch. Give it ids (B, L), filled up with its padding_idx, and no offsets"
        )
    if isinstance(padding, int) and padding < 0:
        padding += table.meta["val"].shape[0]
    return _Bag(table, source, mode, weighed, padding if isinstance(padding, int) else None)


def _rows_of(ids: object, offsets: object) -> Node | None:
    """The ids (B, L) that torch laid flat, where a bag is a row of them."""
    source = _unflattened(ids)
    if source is None or not isinstance(offsets, Node) or offsets.target is not _aten.arange.start_step:
        return None
    length = source.meta["val"].shape[1]
    start, step = offsets.args[0], offsets.args[2]
    return source if isinstance(length, int) and (start, step) == (0, length) else None


def _unflattened(flat: object) -> Node | None:
    if not isinstance(flat, Node) or flat.target not in _FLATTENED:
        return None
    source = flat.args[0]
    value = source.meta.get("val") if isinstance(source, Node) else None
    return source if isinstance(source, Node) and isinstance(value, Tensor) and value.ndim == 2 else None


class _Lowering:
    """Nodes in place of one EmbeddingBag, each with its shape noted and the line that called the bag."""

    def __init__(self, node: Node) -> None:
        self._graph, self._trace = node.graph, node.meta.get("stack_trace")

    def reduce(self, bag: _Bag) -> Node:
        """(B, D) of a bag."""
        rows = self._call(_aten.embedding.default, bag.table, bag.ids)  # (B, L, D)
        keep = None if bag.padding is None else self._call(_aten.ne.Scalar, bag.ids, bag.padding)  # (B, L)
        if bag.mode == _MAX:
            return self._largest(rows, keep)
        if bag.sample_weights is not None:
            weights = self._call(_aten.unsqueeze.default, bag.sample_weights, 2)
            rows = self._call(_aten.mul.Tensor, rows, weights)
        if keep is None:
            target = _aten.mean.dim if bag.mode == _MEAN else _aten.sum.dim_IntList
            return self._call(target, rows, [1])
        kept = self._call(_aten.unsqueeze.default, self._as_floats(keep), 2)  # (B, L, 1)
        total = self._call(_aten.sum.dim_IntList, self._call(_aten.mul.Tensor, rows, kept), [1])
        if bag.mode == _SUM:
            return total
        count = self._call(_aten.clamp.default, self._call(_aten.sum.dim_IntList, kept, [1]), 1.0)
        return self._call(_aten.div.Tensor, total, count)

    def _largest(self, rows: Node, keep: Node | None) -> Node:
        if keep is None:
            return self._call(_aten.amax.default, rows, [1])
        kept = self._call(_aten.unsqueeze.default, keep, 2)  # (B, L, 1)
        others = self._call(_aten.where.ScalarOther, kept, rows, float("-inf"))
        largest = self._call(_aten.amax.default, others, [1])
        return self._call(_aten.where.ScalarOther, self._call(_aten.any.dim, kept, 1), largest, 0.0)

    def _as_floats(self, keep: Node) -> Node:
        return self._call(_aten._to_copy.default, keep, dtype=torch.float32)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node: Node = self._graph.call_function(target, args, kwargs)
        values = [value.meta["val"] if isinstance(value, Node) else value for value in args]
        node.meta["val"] = target(*values, **kwargs)
        node.meta["stack_trace"] = self._trace
        return node

"""Weighted sums of the experts that a row chose, taken out of all of them.

    v, i = topk(…, k);  f = Σ_j v_j · e[i_j]     e (B, K, D), taken by gather or by e[arange(B)[:, None], i]

The routing weights are those of all experts, 0 for the others: w[b, i_j] = v_j.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from te_export.modules.gates.find_experts import VIEWS, ExpertSearch
from te_export.modules.gates.gate_weights import GateWeights
from te_export.modules.gates.weighted_sums import is_weighted_sum, products_of

__all__ = ["Chosen", "behind_views", "fusions_of_chosen"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Chosen:
    """Weights of the experts that a row chose.

    Attributes:
        weights: (B, k) but for axes of length 1.
        index: which experts these are, (B, k, …), the same along all further axes.
        num_experts: K, of all.
    """

    weights: Node
    index: Node
    num_experts: int


def fusions_of_chosen(weights: GateWeights, experts: ExpertSearch) -> Iterator[tuple[Node, Chosen]]:
    """Weighted sums of experts that an index takes out of all of them."""
    values = experts.values
    for end, other in products_of(weights.node):
        found = _index_of(behind_views(other))
        if found is None:
            continue
        source, index = found
        whole, at = values.get(source), values.get(index)
        if not isinstance(whole, Tensor) or not isinstance(at, Tensor) or whole.ndim < 2:
            continue
        if at.shape[:2] != weights.values.shape:
            continue
        places = at.reshape(*weights.values.shape, -1)
        if not bool((places == places[..., :1]).all()):
            continue
        of_all = replace(experts, count=whole.shape[1])
        spread = weights.values.new_zeros(len(whole), whole.shape[1])
        spread.scatter_add_(1, places[..., 0], weights.values)
        if is_weighted_sum(values.get(end), spread, whole, source) and of_all.is_of_experts(source):
            yield end, Chosen(weights.node, index, whole.shape[1])


def behind_views(node: Node) -> Node:
    """What a value is, but for how it is laid out or repeated."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node


def _index_of(node: Node) -> tuple[Node, Node] | None:
    """What a node takes experts out of, along its axis 1, and the index by which; None where it does something else."""
    given: list[Any] = [*node.args]
    if node.target is _aten.gather.default and given[1] == 1:
        return given[0], given[2]
    if (
        node.target is _aten.index.Tensor
        and len(given[1]) == 2
        and all(isinstance(part, Node) for part in given[1])
    ):
        return given[0], given[1][1]
    return None

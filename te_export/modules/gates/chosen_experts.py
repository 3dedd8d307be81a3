"""Weighted sums of the experts that a row chose, taken out of all of them.

    v, i = topk(…, k);  f = Σ_j v_j · e[i_j]     e (B, K, D), taken by gather or by e[arange(B)[:, None], i]

The routing weights are those of all experts, 0 for the others: w[b, i_j] = v_j.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from te_export.modules.gates.find_experts import ExpertSearch
from te_export.modules.gates.gate_weights import GateWeights
from te_export.modules.gates.weighted_sums import is_weighted_sum
from te_export.modules.operators import VIEWS
from te_export.modules.trace import has_batch_first

__all__ = ["Chosen", "behind_views", "fusions_of_chosen"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Chosen:
    """Weights of the experts that a row chose.

    Attributes:
        weights: (B, k) but for axes of length 1.
        index: which experts these are, (B, k, …), the same along all further axes; (B,) of one.
        num_experts: K, of all.
    """

    weights: Node
    index: Node
    num_experts: int


def fusions_of_chosen(
    weights: GateWeights, experts: ExpertSearch, fusions: Iterable[tuple[Node, Node]]
) -> Iterator[tuple[Node, Chosen]]:
    """Weighted sums of experts that an index takes out of all of them.

    Args:
        fusions: what may be such sums, with what the weights multiply in them.
    """
    values = experts.values
    for end, other in fusions:
        found = _index_of(behind_views(other), values)
        if found is None or not has_batch_first(found[0]):
            continue
        source, index = found
        whole, at = values.get(source), values.get(index)
        if not isinstance(whole, Tensor) or not isinstance(at, Tensor) or whole.ndim < 2:
            continue
        count = whole.shape[1]
        at = at.unsqueeze(1) if at.ndim == 1 else at  # one expert for each row
        if at.shape[:2] != weights.values.shape or not bool(((at >= 0) & (at < count)).all()):
            continue
        places = at.reshape(*weights.values.shape, -1).long()
        if not bool((places == places[..., :1]).all()):
            continue
        spread = weights.values.new_zeros(len(whole), count)
        spread.scatter_add_(1, places[..., 0], weights.values)
        of_all = replace(experts, count=count)
        if is_weighted_sum(values.get(end), spread, whole, source) and of_all.is_of_experts(source):
            yield end, Chosen(weights.node, index, count)


def behind_views(node: Node) -> Node:
    """What a value is, but for how it is laid out or repeated."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node


def _index_of(node: Node, values: Mapping[Node, Any]) -> tuple[Node, Node] | None:
    """What a node takes experts out of, along its axis 1, and the index by which; None where it does something else."""
    given: list[Any] = [*node.args]
    if node.target is _aten.gather.default and given[1] == 1:
        return given[0], given[2]
    if node.target is not _aten.index.Tensor or len(given[1]) != 2:
        return None
    rows, index = given[1]
    places = values.get(rows)
    if not isinstance(index, Node) or not isinstance(places, Tensor) or places.is_floating_point():
        return None
    return (given[0], index) if places.flatten().tolist() == list(range(places.numel())) else None

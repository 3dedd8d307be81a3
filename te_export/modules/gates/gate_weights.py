"""Which values of a traced program may be the weights that a gate gives to experts.

    softmax(s)                                           a distribution
    scatter(0, top, softmax(s[top])), p[top] / Σ p[top]  the same of the experts that a row chose
    sigmoid(s), s.softmax(…) where it is among the k largest, one_hot(argmax(s))    weights that need not sum to 1
    relu(s) / Σ relu(s), exp(s) / Σ exp(s)               a distribution again

One weight for each row and expert, none below 0, made of scores by pointwise arithmetic, sums and choices alone. Whether
they are a gate's is then a question of what they feed (find_gates.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from te_export.modules.operators import LAYERS, PIECES, VIEWS, is_getitem
from te_export.modules.trace import Traced, has_batch_first

__all__ = ["FoundWeights", "GateWeights", "find_weights"]

_aten = torch.ops.aten
_SOFTMAXES = frozenset({_aten.softmax.int, _aten._softmax.default, _aten._safe_softmax.default})
_CHOICES = frozenset(
    {_aten.sigmoid.default, _aten.topk.default, _aten.argmax.default, _aten.max.dim, _aten.sort.default}
)
"""What is made of these may be weights that do not sum to 1."""
_POSITIVE = frozenset({_aten.relu.default, _aten.exp.default, _aten.softplus.default, _aten.clamp.default,
                       _aten.clamp_min.default, _aten.pow.Tensor_Scalar, _aten.abs.default})  # fmt: skip
"""What is made of these is weights where it sums to 1: the layers of a network have activations too."""
_TOLERANCE = 1e-9
_LEAST_SUM = 0.99
"""Of what was divided by its sum and a small number, so that nothing is divided by 0."""


@dataclass(frozen=True)
class GateWeights:
    """Values that may be the weights of experts.

    Attributes:
        node: (B, K) but for axes of length 1.
        values: (B, K) on some rows.
        are_a_distribution: whether those of each row sum to 1, or hardly less; a row may have none.
    """

    node: Node
    values: Tensor
    are_a_distribution: bool


@dataclass(frozen=True)
class FoundWeights:
    """What may be weights, in the order of the graph.

    Attributes:
        whole: of all experts of a gate.
        single: of one expert each, (B, 1), that are no columns of those.
    """

    whole: tuple[GateWeights, ...]
    single: tuple[GateWeights, ...]


def find_weights(traced: Traced, values: Mapping[Node, Any]) -> FoundWeights:
    """Everything that may be a gate's weights.

    Args:
        values: of every node, on some rows that the module answers, in float64.
    """
    chosen = _made_of(traced, _SOFTMAXES | _CHOICES)
    made = chosen | _made_of(traced, _POSITIVE)
    whole: list[GateWeights] = []
    single: list[GateWeights] = []
    known: set[Node] = set()  # weights, their pieces, and what only lays them out otherwise
    for node in traced.graph.nodes:
        if node not in made:
            continue
        if _lays_out(node) and not known.isdisjoint(node.all_input_nodes):
            known.add(node)
            continue
        weights = _weights(node, values.get(node))
        if weights is None or not (weights.are_a_distribution or node in chosen):
            continue
        known.add(node)
        if weights.values.shape[1] > 1:
            whole.append(weights)
        elif node in chosen:
            single.append(weights)
    return FoundWeights(tuple(whole), tuple(single))


def _made_of(traced: Traced, sources: frozenset[Any]) -> set[Node]:
    """Nodes that are made of what such operators give, with no layer between."""
    made: set[Node] = set()
    for node in traced.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in LAYERS and not made.issuperset(node.all_input_nodes):
            continue  # a product of what was made so, as einsum("bj,bjk->bk", v, one_hot(i)), is no layer
        if node.target in sources or not made.isdisjoint(node.all_input_nodes):
            made.add(node)
    return made


def _lays_out(node: Node) -> bool:
    return node.target in VIEWS | PIECES or is_getitem(node)


def _weights(node: Node, value: object) -> GateWeights | None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or not has_batch_first(node):
        return None
    rows = len(value)
    count = value.numel() // max(1, rows)
    if count < 1 or (count not in value.shape[1:] and count > 1) or not bool((value >= 0).all()):
        return None
    if node.target in _SOFTMAXES and not _is_over(node, value, count):
        return None
    flat = value.reshape(rows, count)
    sums = flat.sum(1)
    is_distribution = bool(((sums <= 1 + _TOLERANCE) & ((sums >= _LEAST_SUM) | (sums == 0))).all()) and bool(
        sums.any()
    )
    return GateWeights(node, flat, is_distribution)


def _is_over(softmax: Node, value: Tensor, count: int) -> bool:
    """Whether a softmax is over the axis of the experts."""
    axis = softmax.args[1]
    return isinstance(axis, int) and value.shape[axis] == count

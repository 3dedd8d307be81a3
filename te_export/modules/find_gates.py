"""Gates found by what they compute, whatever they are called: weights of experts that feed their weighted sum.

    w                         one weight per row and expert, (B, K) but for axes of length 1 (gate_weights.py)
    f = Σ_k w_k · e_k         by multiply and sum, by matrix product, by einsum, or written out term by term

That f is this sum is not read off the operators: it is computed from the values of w and e, on rows that the module
answers, in float64. That e holds experts, and not the places of a sequence that attention looks at or the features of
one layer, is read off the graph: its K slots are made by layers of their own, or by one that has weights for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from te_export.modules.find_experts import (
    JOINS,
    PIECES,
    PRODUCTS,
    VIEWS,
    ExpertSearch,
    is_getitem,
)
from te_export.modules.gate_weights import GateWeights, find_weights
from te_export.modules.trace import Traced, ancestors, batch_axis

__all__ = ["Gate", "find_gates", "last_gate"]

_aten = torch.ops.aten
_SUMS = frozenset({_aten.sum.dim_IntList, _aten.sum.default})
_ADDS = frozenset({_aten.add.Tensor, *_SUMS, *JOINS, *VIEWS})
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Gate:
    """A gate that one task's output depends on.

    Attributes:
        weights: the node of its routing weights, (B, K) but for axes of length 1.
        fusion: the node whose value is the weighted sum.
        num_experts: K.
    """

    weights: Node
    fusion: Node
    num_experts: int


def find_gates(traced: Traced, values: Mapping[Node, Any]) -> dict[Node, tuple[Gate, ...]]:
    """For every output, the gates on its way, nearest to the output first; those that others follow come later.

    Args:
        values: of every node, on some rows that the module answers, in float64.
    """
    parameters = frozenset(traced.parameter_names())
    gates = [gate for found in find_weights(traced, values) for gate in _gates_of(found, parameters, values)]
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    return {
        output: tuple(
            sorted(
                (gate for gate in gates if gate.fusion in above or gate.fusion is output),
                key=lambda gate: -order[gate.fusion],
            )
        )
        for output in traced.outputs()
        for above in [ancestors(output)]
    }


def last_gate(gates: tuple[Gate, ...]) -> Gate | None:
    """The gate that no other on the way to the output follows; None where there are several, or none.

    One set of weights for two sets of experts is one gate.
    """
    followed = {gate for gate in gates for other in gates if other is not gate and _reads(other, gate)}
    last = [gate for gate in gates if gate not in followed]
    return last[0] if len({gate.weights for gate in last}) == 1 else None


def _reads(later: Gate, earlier: Gate) -> bool:
    return earlier.fusion in ancestors(later.fusion)


def _gates_of(weights: GateWeights, parameters: frozenset[Node], values: Mapping[Node, Any]) -> list[Gate]:
    """A gate for every weighted sum that the weights feed: tasks may share them, and have experts of their own."""
    node, flat = weights.node, weights.values
    count = flat.shape[1]
    experts = ExpertSearch(count, values, parameters, in_wide_layers=weights.are_a_distribution)
    found = dict.fromkeys((*_whole_fusions(node, flat, experts), *_fusions_by_terms(node, flat, experts)))
    return [Gate(node, fusion, count) for fusion in found]


def _whole_fusions(node: Node, weights: Tensor, experts: ExpertSearch) -> Iterator[Node]:
    """Sums of a product of all weights at once."""
    values = experts.values
    for reader, operand in _through_views(node):
        if reader.target in PRODUCTS:
            ends = [reader]
        elif reader.target is _aten.mul.Tensor:
            ends = [user for user, _ in _through_views(reader) if user.target in _SUMS]
        else:
            continue
        others = [other for other in reader.all_input_nodes if other is not operand]
        for end, other in itertools.product(ends, others):
            is_sum = _is_weighted_sum(values.get(end), weights, values.get(other), other)
            if is_sum and experts.is_of_experts(other):
                yield end


def _through_views(node: Node) -> Iterator[tuple[Node, Node]]:
    """Nodes that read the value, looking through those that only lay it out otherwise; with what they read."""
    for user in node.users:
        if user.target in VIEWS:
            yield from _through_views(user)
        else:
            yield user, node


def _is_weighted_sum(found: object, weights: Tensor, experts: object, node: Node) -> bool:
    """Whether `found` is Σ_k weights[b, k] · experts[b, k], for some axis k of the experts."""
    if not isinstance(found, Tensor) or not isinstance(experts, Tensor):
        return False
    rows, count = weights.shape
    batch = batch_axis(node)
    if batch is None:
        return False
    for axis in range(experts.ndim):
        if axis == batch or experts.shape[axis] != count or found.numel() * count != experts.numel():
            continue
        slots = experts.movedim((batch, axis), (0, 1)).reshape(rows, count, -1)
        total = torch.einsum("bk,bkd->bd", weights, slots)
        rows_first = [found] if found.shape[0] == rows else []
        rows_first += [
            found.movedim(place, 0) for place in range(1, found.ndim) if found.shape[place] == rows
        ]
        if any(_close(candidate.reshape(rows, -1), total) for candidate in rows_first):
            return True
    return False


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or not bool(torch.isfinite(expected).all()):
        return False
    scale = float(expected.abs().max())
    return scale > 0 and float((found - expected).abs().max()) <= _TOLERANCE * scale


def _fusions_by_terms(gate: Node, weights: Tensor, experts: ExpertSearch) -> Iterator[Node]:
    """w[:, 0]·e_0 + w[:, 1]·e_1 + … written out: the first sum that the terms of all weights have come to."""
    values, count = experts.values, experts.count
    terms = _terms(gate, weights, values)
    if len({index for index, _ in terms.values()}) != count:
        return
    sums: dict[Node, list[Node]] = {product: [product] for product in terms}
    found: set[frozenset[Node]] = set()
    for node in gate.graph.nodes:
        if node in sums or node.target not in _ADDS:
            continue
        leaves = [leaf for source in node.all_input_nodes for leaf in sums.get(source, [source])]
        if not all(leaf in terms for leaf in leaves):
            continue
        sums[node] = leaves
        key = frozenset(leaves)
        if len(leaves) != count or len({terms[leaf][0] for leaf in leaves}) != count or key in found:
            continue
        shapes = {tuple(values[leaf].shape) for leaf in leaves}
        if (
            len(shapes) == 1
            and _close(values[node], torch.stack([values[leaf] for leaf in leaves]).sum(0))
            and experts.are_experts([terms[leaf][1] for leaf in leaves])
        ):
            found.add(key)
            yield node


def _terms(gate: Node, weights: Tensor, values: Mapping[Node, Any]) -> dict[Node, tuple[int, Node]]:
    """By product of one weight and something else, the weight's index and that something."""
    rows, count = weights.shape
    terms: dict[Node, tuple[int, Node]] = {}
    taken: set[int] = set()  # experts that no row chose have the same weights
    for piece in _pieces(gate):
        value = values.get(piece)
        if not isinstance(value, Tensor) or value.numel() != rows:
            continue
        alike = [k for k in range(count) if torch.equal(value.reshape(rows), weights[:, k])]
        index = next((k for k in alike if k not in taken), alike[0] if alike else None)
        for reader, operand in _through_views(piece):
            others = [other for other in reader.all_input_nodes if other is not operand]
            if index is not None and reader.target is _aten.mul.Tensor and len(others) == 1:
                terms[reader] = index, others[0]
                taken.add(index)
    return terms


def _pieces(node: Node) -> Iterator[Node]:
    """Nodes that take some of the weights, and what is taken of those."""
    for user in node.users:
        if user.target in PIECES | VIEWS or is_getitem(user):
            yield user
            yield from _pieces(user)

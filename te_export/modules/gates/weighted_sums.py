"""Weighted sums of experts, in every form that they are written in.

(w[:, :, None] * e).sum(1)                  multiply and sum
w[:, None] @ e, einsum("bk,bkd->bd", w, e)  one product
w[:, 0] * e_0 + w[:, 1] * e_1 + …           term by term, of the columns of w
v_0 * e_0 + v_1 * e_1 + …                   the same of weights that were each made apart, as (p * (top == k)).sum(1)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from te_export.modules.gates.find_experts import ExpertSearch
from te_export.modules.gates.gate_weights import GateWeights
from te_export.modules.operators import JOINS, PIECES, PRODUCTS, VIEWS, is_getitem
from te_export.modules.trace import ancestors, batch_axis
from te_export.modules.trace_rewrites.narrow_columns import piece_of

__all__ = [
    "Term",
    "column_of",
    "fusions_by_columns",
    "fusions_by_terms",
    "is_weighted_sum",
    "products_of",
    "whole_fusions",
]

_aten = torch.ops.aten
_SUMS = frozenset({_aten.sum.dim_IntList, _aten.sum.default})
_ADDS = frozenset({_aten.add.Tensor, *_SUMS, *JOINS, *VIEWS})
_COMPARISONS = frozenset({_aten.eq.Scalar, _aten.ne.Scalar})
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Term:
    """One weight times one expert.

    Attributes:
        product: its node.
        weight: the node of one number a row.
        expert: the node of the expert.
    """

    product: Node
    weight: Node
    expert: Node


def whole_fusions(weights: GateWeights, experts: ExpertSearch) -> Iterator[Node]:
    """Sums of a product of all weights at once."""
    values = experts.values
    for end, other in products_of(weights.node):
        is_sum = is_weighted_sum(values.get(end), weights.values, values.get(other), other)
        if is_sum and experts.is_of_experts(other):
            yield end


def products_of(weights: Node, *, of_one: bool = False) -> Iterator[tuple[Node, Node]]:
    """What ends a product of all weights at once, or a sum of such a product; with what they are multiplied by.

    Args:
        of_one: whether there is one weight, so that the product itself is the sum.
    """
    for reader, operand in _through_views(weights):
        if reader.target in PRODUCTS:
            ends = [reader]
        elif reader.target is _aten.mul.Tensor:
            ends = [user for user, _ in _through_views(reader) if user.target in _SUMS]
            ends += [reader] if of_one else []
        else:
            continue
        others = [other for other in reader.all_input_nodes if other is not operand]
        yield from itertools.product(ends, others)


def _through_views(node: Node) -> Iterator[tuple[Node, Node]]:
    """Nodes that read the value, looking through those that only lay it out otherwise; with what they read."""
    for user in node.users:
        if user.target in VIEWS:
            yield from _through_views(user)
        else:
            yield user, node


def is_weighted_sum(found: object, weights: Tensor, experts: object, node: Node) -> bool:
    """Whether `found` is Σ_k weights[b, k] · experts[b, k], for some axis k of the experts."""
    if not isinstance(found, Tensor) or not isinstance(experts, Tensor) or not experts.is_floating_point():
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


def fusions_by_terms(weights: GateWeights, experts: ExpertSearch) -> Iterator[tuple[Node, tuple[Term, ...]]]:
    """w[:, 0]·e_0 + w[:, 1]·e_1 + … written out: the first sum that the terms of all weights have come to, with those terms
    in the order of the experts. It may have begun with something else, such as a shared expert.
    """
    terms = _terms(weights, experts.values)
    if len({index for index, _ in terms.values()}) != experts.count:
        return
    found: set[frozenset[Node]] = set()
    for node, total in _sums(terms, weights.node.graph).items():
        key = frozenset(total.leaves)
        of_each = len(total.leaves) == experts.count == len({terms[leaf][0] for leaf in total.leaves})
        if of_each and key not in found and _is_sum_of_experts(node, total, terms, experts):
            found.add(key)
            yield (
                node,
                tuple(terms[leaf][1] for leaf in sorted(total.leaves, key=lambda leaf: terms[leaf][0])),
            )


def fusions_by_columns(
    single: Iterable[Node], experts: ExpertSearch
) -> Iterator[tuple[Node, tuple[Term, ...]]]:
    """v_0·e_0 + v_1·e_1 + …: the last sum of such terms, of at least two and nothing else, with the terms in the order of
    the numbers that an index is compared with, or else of the experts' parameters.

    Args:
        single: nodes of one weight a row.
        experts: of any number.
    """
    values = experts.values
    terms = {
        term.product: (index, term)
        for index, weight in enumerate(single)
        for term in _weighted_by(weight, values)
        if not _is_weighted(term.expert, values)
    }
    if not terms:
        return
    graph = next(iter(terms)).graph
    sums = {node: total for node, total in _sums(terms, graph).items() if not total.others}
    keys = {node: frozenset(total.leaves) for node, total in sums.items()}
    holding: dict[Node, list[frozenset[Node]]] = {}
    for key in keys.values():
        for leaf in key:
            holding.setdefault(leaf, []).append(key)
    largest: dict[frozenset[Node], Node] = {}
    for node, key in keys.items():
        is_largest = not any(key < other for other in holding[next(iter(key))])
        if 1 < len(key) == len(sums[node].leaves) and is_largest:
            largest.setdefault(key, node)
    for key, node in largest.items():
        of_all = replace(experts, count=len(key))
        first = values[next(iter(key))]
        if first.numel() == len(first) or not _is_sum_of_experts(node, sums[node], terms, of_all):
            continue
        ordered = _in_order([terms[leaf][1] for leaf in sums[node].leaves], experts.parameters)
        if ordered is not None:
            yield node, ordered


def _is_weighted(node: Node, values: Mapping[Node, Any]) -> bool:
    """Whether a value is a product with another number for each row: its weight is more than the one found."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    if node.target is not _aten.mul.Tensor:
        return False
    sizes = [
        value.numel() for source in node.all_input_nodes if isinstance(value := values.get(source), Tensor)
    ]
    return bool(sizes) and len(sizes) > 1 and min(sizes) <= len(values[node])


def _in_order(terms: Sequence[Term], parameters: frozenset[Node]) -> tuple[Term, ...] | None:
    """Terms in the order of the numbers that their weights compare an index with; else in that of the parameters that each
    expert has to itself; None where one has none, or reads another.
    """
    above = [ancestors(term.expert) for term in terms]
    order = {node: index for index, node in enumerate(terms[0].product.graph.nodes)}
    firsts: list[int] = []
    for index, own in enumerate(above):
        others = set[Node]().union(*(nodes for place, nodes in enumerate(above) if place != index))
        if terms[index].expert in others or not own & parameters - others:
            return None
        firsts.append(min(order[node] for node in own & parameters - others))
    compared = [_compared_with(term.weight) for term in terms]
    numbers = [number for number in compared if number is not None]
    if len(set(numbers)) == len(terms):
        firsts = numbers
    return tuple(term for _, term in sorted(zip(firsts, terms, strict=True), key=lambda pair: pair[0]))


def _compared_with(weight: Node) -> int | None:
    """The one number that the making of a weight compares something with, as in (v * (i == 2)).sum(1)."""
    waiting, numbers = [weight], set[int]()
    while waiting:
        node = waiting.pop()
        if node.target in _COMPARISONS:
            number = node.args[1]
            numbers.add(number if isinstance(number, int) else -1)
        elif node.target in (_aten.sum.dim_IntList, _aten.mul.Tensor, _aten.masked_fill.Scalar, *VIEWS):
            waiting += node.all_input_nodes
        elif node.target in (_aten.where.self, _aten.where.ScalarOther, _aten.where.ScalarSelf):
            waiting += node.all_input_nodes[:1]
    return numbers.pop() if len(numbers) == 1 and min(numbers) >= 0 else None


@dataclass(frozen=True)
class _Sum:
    """What a node adds.

    Attributes:
        leaves: products of a weight and an expert.
        others: anything else, by plain additions alone.
    """

    leaves: tuple[Node, ...]
    others: tuple[Node, ...] = ()


def _sums(terms: Mapping[Node, Any], graph: torch.fx.Graph) -> dict[Node, _Sum]:
    """Nodes that add terms."""
    sums: dict[Node, _Sum] = {product: _Sum((product,)) for product in terms}
    for node in graph.nodes:
        if node in sums or node.target not in _ADDS:
            continue
        parts = [sums.get(source, _Sum((), (source,))) for source in node.all_input_nodes]
        leaves = tuple(leaf for part in parts for leaf in part.leaves)
        others = tuple(other for part in parts for other in part.others)
        is_plain = node.target is _aten.add.Tensor and not node.kwargs
        if leaves and (is_plain or not others):
            sums[node] = _Sum(leaves, others)
    return sums


def _is_sum_of_experts(
    node: Node, total: _Sum, terms: Mapping[Node, tuple[int, Term]], experts: ExpertSearch
) -> bool:
    values = experts.values
    shapes = {tuple(values[leaf].shape) for leaf in total.leaves}
    if len(shapes) > 1 or any(not isinstance(values.get(other), Tensor) for other in total.others):
        return False
    left = values[node]
    for other in total.others:
        left = left - values[other]
    return _close(left, torch.stack([values[leaf] for leaf in total.leaves]).sum(0)) and experts.are_experts(
        [terms[leaf][1].expert for leaf in total.leaves]
    )


def _terms(weights: GateWeights, values: Mapping[Node, Any]) -> dict[Node, tuple[int, Term]]:
    """By product of one weight and something else, the weight's index and the term."""
    rows, count = weights.values.shape
    terms: dict[Node, tuple[int, Term]] = {}
    taken: set[int] = set()  # experts that no row chose have the same weights
    for piece in _pieces(weights.node):
        value = values.get(piece)
        if not isinstance(value, Tensor) or value.numel() != rows:
            continue
        index = column_of(piece, weights.node)
        if index is None:
            alike = [k for k in range(count) if torch.equal(value.reshape(rows), weights.values[:, k])]
            index = next((k for k in alike if k not in taken), alike[0] if alike else None)
        for term in _weighted_by(piece, values):
            if index is not None and term.product not in terms:
                terms[term.product] = index, term
                taken.add(index)
    return terms


def _weighted_by(weight: Node, values: Mapping[Node, Any]) -> Iterator[Term]:
    """Products of one weight a row and something else."""
    for reader, operand in _through_views(weight):
        others = [other for other in reader.all_input_nodes if other is not operand]
        if (
            reader.target is _aten.mul.Tensor
            and len(others) == 1
            and isinstance(values.get(others[0]), Tensor)
        ):
            yield Term(reader, weight, others[0])


def _pieces(node: Node) -> Iterator[Node]:
    """Nodes that take some of the weights, and what is taken of those."""
    for user in node.users:
        if user.target in PIECES | VIEWS or is_getitem(user):
            yield user
            yield from _pieces(user)


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or not bool(torch.isfinite(expected).all()):
        return False
    scale = float(expected.abs().max())
    return scale > 0 and float((found - expected).abs().max()) <= _TOLERANCE * scale


def column_of(node: Node, weights: Node) -> int | None:
    """Which column of `weights` (B, K) a node is, by how it is taken; None where that is not plain."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    piece = piece_of(node)
    if piece is None or piece.axis != 1 or piece.end != piece.start + 1:
        return None
    return piece.start if piece.source is weights else None

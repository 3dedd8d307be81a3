"""Weighted sums that are written out term by term become one.

    w[:, 0:1]·e_0 + w[:, 1:2]·e_1 + …    (w[:, :, None] · stack(e_0, e_1, …)).sum(1)

A loop over experts is a node or three for each of them, and the rewrites of the graph know the other form. It is exact by
what the nodes are, not by the values that found the gate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.fx import Graph, Node

from te_export.modules.gates.find_gates import Gate
from te_export.modules.gates.weighted_sums import Term, column_of
from te_export.modules.trace import Traced
from te_export.modules.trace_rewrites.new_nodes import call, columns_side_by_side

__all__ = ["assemble_terms"]

_aten = torch.ops.aten


def assemble_terms(traced: Traced, gates: Iterable[Gate]) -> None:
    """Rewrite the sums of gates in place, where they are plain additions of products (B, D)."""
    outputs = set(traced.outputs())
    for gate in dict.fromkeys(gates):
        if gate.terms and gate.fusion not in outputs and _is_plain(gate):
            with traced.graph.inserting_before(gate.fusion):
                fused = _fused(traced.graph, gate)
            gate.fusion.replace_all_uses_with(fused)


def _fused(graph: Graph, gate: Gate) -> Node:
    weights = gate.weights
    if not isinstance(weights, Node) or not _are_columns(gate.terms, weights):
        weights = columns_side_by_side(graph, [term.weight for term in gate.terms])
    experts = call(graph, _aten.stack.default, [term.expert for term in gate.terms], 1)
    products = call(graph, _aten.mul.Tensor, call(graph, _aten.unsqueeze.default, weights, -1), experts)
    return call(graph, _aten.sum.dim_IntList, products, [1])


def _is_plain(gate: Gate) -> bool:
    """Whether nothing but additions of the terms themselves make the sum, and each is (B, 1) times (B, D)."""
    left = [term.product for term in gate.terms]
    waiting = [gate.fusion]
    while waiting:
        node = waiting.pop()
        if node in left:
            left.remove(node)
        elif node.target is _aten.add.Tensor and not node.kwargs and len(node.all_input_nodes) == 2:
            waiting += node.all_input_nodes
        else:
            return False
    shapes = {_shape(node) for term in gate.terms for node in (term.product, term.expert)}
    return (
        not left
        and len(shapes) == 1
        and len(shapes.pop()) == 2
        and all(_is_column(term) for term in gate.terms)
    )


def _is_column(term: Term) -> bool:
    """Whether what multiplies the expert is one number for each row, and not one for each feature."""
    (factor,) = (node for node in term.product.all_input_nodes if node is not term.expert)
    return (
        len(_shape(factor)) == 2 and _shape(factor)[1] == "1" and _shape(factor)[0] == _shape(term.expert)[0]
    )


def _shape(node: Node) -> tuple[str, ...]:
    return tuple(map(str, node.meta["val"].shape))


def _are_columns(terms: Sequence[Term], weights: Node) -> bool:
    """Whether the weights of the terms are the columns of one value (B, K), in order."""
    if len(_shape(weights)) != 2 or _shape(weights)[1] != str(len(terms)):
        return False
    return all(column_of(term.weight, weights) == index for index, term in enumerate(terms))

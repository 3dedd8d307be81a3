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
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    # the last first: what it sums may be the sum of another gate, which is replaced in it then
    for gate in sorted(dict.fromkeys(gates), key=lambda gate: -order[gate.fusion]):
        others = _others(gate) if gate.terms and gate.fusion not in outputs else None
        if others is None:
            continue
        graph = traced.graph
        with graph.inserting_before(gate.fusion):
            fused = _fused(graph, gate)
            for other in others:
                fused = call(graph, _aten.add.Tensor, other, fused)
        gate.fusion.replace_all_uses_with(fused)


def _fused(graph: Graph, gate: Gate) -> Node:
    weights = gate.weights
    if not isinstance(weights, Node) or not _are_columns(gate.terms, weights):
        weights = columns_side_by_side(graph, [term.weight for term in gate.terms])
    if weights.meta["val"].dtype != torch.float32:  # each was rounded before its product
        weights = call(graph, _aten._to_copy.default, weights, dtype=torch.float32)
    experts = call(graph, _aten.stack.default, [term.expert for term in gate.terms], 1)
    products = call(graph, _aten.mul.Tensor, call(graph, _aten.unsqueeze.default, weights, -1), experts)
    return call(graph, _aten.sum.dim_IntList, products, [1])


def _others(gate: Gate) -> list[Node] | None:
    """What a sum adds beside its terms; None where it is more than additions of these, or no term is (B, 1) times (B, D)."""
    terms = {term.product for term in gate.terms}
    adding = _adding(terms, gate.fusion.graph)
    left, others = set(terms), []
    waiting = [gate.fusion]
    while waiting:
        node = waiting.pop()
        if node in left:
            left.remove(node)
        elif node in terms:
            return None  # twice
        elif node in adding:
            waiting += node.all_input_nodes
        else:
            others.append(node)
    forms = {_form(node) for node in (*terms, *others, *(term.expert for term in gate.terms))}
    dtype, *shape = forms.pop()
    is_plain = not left and not forms and dtype == str(torch.float32) and len(shape) == 2
    return others if is_plain and all(_is_column(term) for term in gate.terms) else None


def _adding(terms: set[Node], graph: Graph) -> set[Node]:
    """Plain additions of terms, and of what such additions give."""
    adding: set[Node] = set()
    for node in graph.nodes:
        is_plain = node.target is _aten.add.Tensor and not node.kwargs and len(node.all_input_nodes) == 2
        if is_plain and any(source in terms or source in adding for source in node.all_input_nodes):
            adding.add(node)
    return adding


def _is_column(term: Term) -> bool:
    """Whether what multiplies the expert is one number for each row, and not one for each feature."""
    factors = [node for node in term.product.all_input_nodes if node is not term.expert]
    return len(factors) == 1 and _form(factors[0]) == (*_form(term.expert)[:2], "1")


def _form(node: Node) -> tuple[str, ...]:
    value = node.meta["val"]
    return tuple(map(str, (value.dtype, *value.shape)))


def _are_columns(terms: Sequence[Term], weights: Node) -> bool:
    """Whether the weights of the terms are the columns of one value (B, K), in order."""
    if _form(weights)[2:] != (str(len(terms)),):
        return False
    return all(column_of(term.weight, weights) == index for index, term in enumerate(terms))

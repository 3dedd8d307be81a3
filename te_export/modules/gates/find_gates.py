"""Gates found by what they compute, whatever they are called: weights of experts that feed their weighted sum.

    w                         one weight per row and expert (gate_weights.py)
    f = Σ_k w_k · e_k         by multiply and sum, by matrix product, by einsum, or written out term by term
                              (weighted_sums.py); of the experts that a row chose (chosen_experts.py)

That f is this sum is not read off the operators: it is computed from the values of w and e, on rows that the module
answers, in float64. That e holds experts, and not the places of a sequence that attention looks at or the features of
one layer, is read off the graph: its K slots are made by layers of their own, or by one that has weights for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from te_export.modules.gates.chosen_experts import Chosen, fusions_of_chosen
from te_export.modules.gates.find_experts import ExpertSearch
from te_export.modules.gates.gate_weights import GateWeights, find_weights
from te_export.modules.gates.weighted_sums import (
    Term,
    fusions_by_columns,
    fusions_by_terms,
    products_of,
    whole_fusions,
)
from te_export.modules.trace import Traced, ancestors

__all__ = ["Gate", "find_gates", "last_gate"]


@dataclass(frozen=True)
class Gate:
    """A gate that one task's output depends on.

    Attributes:
        weights: the node of its routing weights, (B, K) but for axes of length 1; for each expert a node of one number a
            row, where the program makes them one by one; or those of the experts that a row chose.
        fusion: the node whose value is the weighted sum.
        num_experts: K.
        terms: what was summed, expert by expert, where it was written so.
    """

    weights: Node | tuple[Node, ...] | Chosen
    fusion: Node
    num_experts: int
    terms: tuple[Term, ...] = ()


def find_gates(traced: Traced, values: Mapping[Node, Any]) -> dict[Node, tuple[Gate, ...]]:
    """For every output, the gates on its way, nearest to the output first; those that others follow come later.

    Args:
        values: of every node, on some rows that the module answers, in float64.
    """
    gates = list(_gates(traced, values))
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


def _gates(traced: Traced, values: Mapping[Node, Any]) -> Iterator[Gate]:
    parameters = frozenset(traced.parameter_names())
    found = find_weights(traced, values)
    for weights in found.whole:
        yield from _gates_of(weights, parameters, values)
    of_any = ExpertSearch(1, values, parameters)
    for weights in found.single:
        yield from _gates_of_chosen(weights, of_any)
    single = [weights.node for weights in found.single if weights.node not in traced.outputs()]
    for fusion, terms in fusions_by_columns(single, of_any):
        yield Gate(tuple(term.weight for term in terms), fusion, len(terms), terms)


def _gates_of(
    weights: GateWeights, parameters: frozenset[Node], values: Mapping[Node, Any]
) -> Iterator[Gate]:
    """A gate for every weighted sum that the weights feed: tasks may share them, and have experts of their own."""
    experts = ExpertSearch(
        weights.values.shape[1], values, parameters, in_wide_layers=weights.are_a_distribution
    )
    for fusion in dict.fromkeys(whole_fusions(weights, experts)):
        yield Gate(weights.node, fusion, experts.count)
    for fusion, terms in fusions_by_terms(weights, experts):
        yield Gate(weights.node, fusion, experts.count, terms)
    yield from _gates_of_chosen(weights, experts)


def _gates_of_chosen(weights: GateWeights, experts: ExpertSearch) -> Iterator[Gate]:
    fusions = products_of(weights.node, of_one=weights.values.shape[1] == 1)
    for fusion, chosen in fusions_of_chosen(weights, experts, fusions):
        yield Gate(chosen, fusion, chosen.num_experts)

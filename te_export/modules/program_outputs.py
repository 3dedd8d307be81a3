"""Which values the traced program gives: every task's prediction, and the routing weights of its gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument
from torch.fx import Node
from torch.utils import _pytree as pytree

from te_export.modules.gates.chosen_experts import Chosen, behind_views
from te_export.modules.gates.find_gates import Gate
from te_export.modules.trace import Traced
from te_export.modules.trace_rewrites.new_nodes import call, columns_side_by_side, laid_out, scores_of, spread

__all__ = ["TaskNodes", "give_outputs"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class TaskNodes:
    """Where the program makes what one task gives.

    Attributes:
        gate: the last gate on the way to the prediction; None where there is none, or several side by side.
        has_several: whether it is None for the second reason.
    """

    name: str
    prediction: Node
    gate: Gate | None
    has_several: bool = False


def give_outputs(traced: Traced, tasks: Sequence[TaskNodes]) -> None:
    """Have the program give every prediction and the routing weights of every gate, each by a node of its own."""
    graph = traced.graph
    (end,) = (node for node in graph.nodes if node.op == "output")
    given: list[Node] = []
    with graph.inserting_before(end):
        for task in tasks:
            given.append(_own(graph, task.prediction, given))
            if task.gate is not None:
                given.append(_own(graph, _as_rows(graph, task.gate), given))
    end.args = (tuple(given),)
    program = traced.program
    program._graph_signature = replace(
        program.graph_signature,
        output_specs=[OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in given],
    )
    signature = program.module_call_graph[0].signature
    assert signature is not None  # the entry of the whole module has one
    signature.outputs = [TensorArgument(node.name) for node in given]
    signature.out_spec = pytree.tree_structure(tuple(given))
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()


def _as_rows(graph: torch.fx.Graph, gate: Gate) -> Node:
    """The routing weights as (B, K) float32."""
    weights = gate.weights
    if isinstance(weights, tuple):
        rows = columns_side_by_side(graph, weights)
    elif isinstance(weights, Chosen):
        rows = _spread(graph, weights)
    else:
        rows = laid_out(graph, weights, gate.num_experts)
    return (
        rows
        if rows.meta["val"].dtype == torch.float32
        else call(graph, _aten._to_copy.default, rows, dtype=torch.float32)
    )


def _spread(graph: torch.fx.Graph, chosen: Chosen) -> Node:
    """The weights of chosen experts, each in its expert's column: (B, K)."""
    index = behind_views(chosen.index)
    count = math.prod(chosen.weights.meta["val"].shape[1:])
    if scores_of(index) is None or index.meta["val"].shape[1] != count:
        index = chosen.index  # and not what it repeats
    if index.meta["val"].ndim == 1:
        index = call(graph, _aten.unsqueeze.default, index, 1)
    while index.meta["val"].ndim > 2:
        index = call(graph, _aten.select.int, index, index.meta["val"].ndim - 1, 0)
    if index.meta["val"].dtype != torch.int64:
        index = call(graph, _aten._to_copy.default, index, dtype=torch.int64)
    weights = laid_out(graph, chosen.weights, int(index.meta["val"].shape[1]))
    return spread(graph, weights, index, chosen.num_experts)


def _own(graph: torch.fx.Graph, node: Node, given: Sequence[Node]) -> Node:
    if node not in given and node.op != "placeholder":
        return node
    copy = graph.call_function(_aten.clone.default, (node,))
    copy.meta["val"] = node.meta["val"]
    return copy

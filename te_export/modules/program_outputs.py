"""Which values the traced program gives: every task's prediction, and the routing weights of its gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument
from torch.fx import Node
from torch.utils import _pytree as pytree

from te_export.modules.find_gates import Gate
from te_export.modules.trace import Traced

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
    """The routing weights as (B, K)."""
    value = gate.weights.meta["val"]
    if value.ndim == 2:
        return gate.weights
    rows = graph.call_function(_aten.view.default, (gate.weights, [-1, gate.num_experts]))
    rows.meta["val"] = value.reshape(-1, gate.num_experts)
    return rows


def _own(graph: torch.fx.Graph, node: Node, given: Sequence[Node]) -> Node:
    if node not in given and node.op != "placeholder":
        return node
    copy = graph.call_function(_aten.clone.default, (node,))
    copy.meta["val"] = node.meta["val"]
    return copy

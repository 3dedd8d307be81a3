"""Sigmoids that are divided by their own sum, written so that small ones stay right.

    sigmoid(s) / Σ sigmoid(s)      y / Σ y,  y = 1 / (1 + exp(-s))

onnxruntime's float32 Sigmoid is off by half at -17 and gives 0 from -18 on, which a division by a sum of such numbers shows.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from te_export.modules.operators import LAYERS
from te_export.modules.trace import Traced
from te_export.modules.trace_rewrites.new_nodes import call

__all__ = ["write_out_sigmoids"]

_aten = torch.ops.aten


def write_out_sigmoids(traced: Traced) -> None:
    """Write such sigmoids out, in place."""
    graph = traced.graph
    for node in list(graph.nodes):
        if node.target is _aten.sigmoid.default and _is_divided_by_itself(node):
            with graph.inserting_before(node):
                power = call(graph, _aten.exp.default, call(graph, _aten.neg.default, node.args[0]))
                whole = call(graph, _aten.add.Tensor, power, 1.0)
                node.replace_all_uses_with(call(graph, _aten.reciprocal.default, whole))
    graph.eliminate_dead_code()
    traced.program.graph_module.recompile()


def _is_divided_by_itself(node: Node) -> bool:
    """Whether both sides of a division are made of it, with no layer between."""
    made = {node}
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user in made or user.op != "call_function" or user.target in LAYERS:
                continue
            made.add(user)
            waiting.append(user)
    return any(other.target is _aten.div.Tensor and made.issuperset(other.all_input_nodes) for other in made)

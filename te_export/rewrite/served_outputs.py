"""Which graph outputs each node serves.

Before the cut, what is joined must serve the same outputs: a stack of two tasks' gates would be computed
whole in the graph of either task.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

__all__ = ["served_outputs"]


def served_outputs(graph: ir.Graph) -> Mapping[ir.Node, int]:
    """For each node, a bit mask of the graph outputs that depend on it."""
    masks: dict[ir.Node, int] = {}
    outputs = {value: 1 << index for index, value in enumerate(graph.outputs)}
    for node in reversed(list(graph)):  # readers stand after what they read
        mask = 0
        for value in node.outputs:
            mask |= outputs.get(value, 0)
            for use in value.uses():
                mask |= masks.get(use.node, 0)
        masks[node] = mask
    return masks

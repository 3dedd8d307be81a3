"""What was only reshaped, or only split and joined, is what it was.

r = Reshape(Reshape(s))   of the shape of s     s
c = Concat(Split(s))      all pieces in order   s
"""

from __future__ import annotations

import onnx_ir as ir

from te_export.rewrite.edit import Edit, axes_of
from te_export.rewrite.log import Applied, Declined, Findings
from te_export.rewrite.pieces import pieces_of

__all__ = ["RULE", "cancel_shapes"]

RULE = "cancel_shapes"


def cancel_shapes(graph: ir.Graph) -> Findings:
    """Drop every such pair, in place."""
    applied: list[Applied] = []
    declined: list[Declined] = []
    for node in list(graph):
        origin = _match(node)
        if origin is None:
            continue
        if node.outputs[0].is_graph_output():
            declined.append(Declined(RULE, str(node.name), "it gives an output of the graph its name"))
            continue
        edit = Edit(graph)
        edit.replace(node.outputs[0], origin)
        edit.done()
        applied.append(Applied(RULE, str(node.name), f"it gave {origin.name} again"))
    return Findings(tuple(applied), tuple(declined))


def _match(node: ir.Node) -> ir.Value | None:
    """The value that `node` gives again."""
    if node.op_type == "Concat" and len(node.inputs) > 1 and None not in node.inputs:
        pieces = pieces_of([value for value in node.inputs if value is not None])
        return pieces.whole if pieces is not None and node.attributes["axis"].as_int() in (1, -1) else None
    before = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] is not None else None
    if before is None or before.op_type != "Reshape":
        return None
    shape = axes_of(before.inputs[0])
    return before.inputs[0] if shape is not None and shape == axes_of(node.outputs[0]) else None

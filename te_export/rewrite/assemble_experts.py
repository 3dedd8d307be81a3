"""Stacking expert features costs one Concat, not an Unsqueeze for each expert.

    u_i = Unsqueeze(e_i (B, D), 1)                     c = Concat(e_0, e_1, …, axis=1)  (B, K·D)
    e = Concat(u_0, u_1, …, axis=1)  (B, K, D)         e = Reshape(c, [-1, K, D])

Where the e_i are all pieces of one Split, in order, there is no Concat either: c is what was split.
"""

from __future__ import annotations

import onnx_ir as ir

from te_export.rewrite.edit import Axes, Edit, axes_of
from te_export.rewrite.log import Applied, Declined, Findings
from te_export.rewrite.pieces import as_cube, pieces_of

__all__ = ["RULE", "assemble_experts"]

RULE = "assemble_experts"


def assemble_experts(graph: ir.Graph) -> Findings:
    """Rewrite every such Concat, in place."""
    applied: list[Applied] = []
    declined: list[Declined] = []
    for node in list(graph):
        rows = _match(node)
        if rows is None:
            continue
        checked = _check(node, rows)
        if isinstance(checked, str):
            declined.append(Declined(RULE, str(node.name), checked))
        else:
            applied.append(Applied(RULE, str(node.name), _rewrite(graph, node, rows, checked)))
    return Findings(tuple(applied), tuple(declined))


def _match(node: ir.Node) -> list[ir.Value] | None:
    """What the inputs of a Concat are unsqueezed from."""
    if node.op_type != "Concat" or len(node.inputs) < 2:
        return None
    rows = []
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != "Unsqueeze" or producer.inputs[0] is None:
            return None
        rows.append(producer.inputs[0])
    return rows


def _check(node: ir.Node, rows: list[ir.Value]) -> Axes | str:
    """The shape (B, D) that all rows have."""
    if node.outputs[0].dtype != ir.DataType.FLOAT:
        return f"it joins {node.outputs[0].dtype}, expected float32"
    shapes = {axes_of(row) for row in rows}
    (shape, *others) = shapes
    if others or shape is None or len(shape) != 2 or not isinstance(shape[1], int):
        return f"what it joins has shapes {sorted(map(str, shapes))}, expected one shape (batch, features)"
    expected = (shape[0], len(rows), shape[1])
    if node.attributes["axis"].as_int() not in (1, -2) or axes_of(node.outputs[0]) != expected:
        return f"it does not give {expected}, a row for each of what it joins"
    return shape


def _rewrite(graph: ir.Graph, node: ir.Node, rows: list[ir.Value], shape: Axes) -> str:
    edit = Edit(graph)
    batch, width = shape
    assert isinstance(width, int)  # _check saw it
    pieces = pieces_of(rows)
    if pieces is not None:
        cube = as_cube(edit, pieces, [0, 1, 2], name=str(node.name))
        what = f"{len(rows)} Unsqueeze and a Concat were a Reshape of what had been split"
    else:
        joined = edit.add("Concat", rows, (batch, len(rows) * width), name=f"{node.name}.flat", axis=1)
        size = edit.integers([-1, len(rows), width], name=f"{node.name}.shape")
        cube = edit.add("Reshape", [joined, size], (batch, len(rows), width), name=f"{node.name}.cube")
        what = f"{len(rows)} Unsqueeze and a Concat became a Concat and a Reshape"
    edit.replace(node.outputs[0], cube)
    edit.done()
    return what

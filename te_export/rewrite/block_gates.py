"""The gates and fusions of all tasks as one block. The joint graph only.

    w_t = Softmax(l_t (B, K))   for each t          w = Softmax(Reshape(l, [-1, T, K]))      (B, T, K)
    f_t = fusion of w_t and e (B, K, D)             w_0, … = Split(Reshape(w, [-1, T·K]), axis=1)
                                                    f = MatMul(w, e)                         (B, T, D)
                                                    f_0, … = Split(Reshape(f, [-1, T·D]), axis=1)

l is the concatenation of the l_t, or what they are the pieces of. Every w_t stays a value of the graph, and
the cost is that of the tasks apart: linear in T.
"""

from __future__ import annotations

import onnx_ir as ir

from te_export.rewrite.edit import Edit, axes_of
from te_export.rewrite.fusion import Fusion, read_fusion
from te_export.rewrite.log import Applied, Declined, Findings
from te_export.rewrite.pieces import as_cube, pieces_of

__all__ = ["RULE", "block_gates"]

RULE = "block_gates"


def block_gates(graph: ir.Graph) -> Findings:
    """Join the gates and fusions over each set of experts, in place."""
    applied: list[Applied] = []
    declined: list[Declined] = []
    for fusions in _match(graph):
        problem = _check(fusions)
        if problem is not None:
            declined.append(Declined(RULE, str(fusions[0].node.name), problem))
        else:
            _rewrite(graph, fusions)
            what = f"{len(fusions)} softmaxes and fusions over {fusions[0].count} experts became one of each"
            applied.append(Applied(RULE, str(fusions[0].node.name), what))
    return Findings(tuple(applied), tuple(declined))


def _match(graph: ir.Graph) -> list[list[Fusion]]:
    groups: dict[ir.Value, list[Fusion]] = {}
    for node in graph:
        fusion = read_fusion(node)
        if fusion is not None:
            groups.setdefault(fusion.experts, []).append(fusion)
    return [group for group in groups.values() if len(group) > 1]


def _check(fusions: list[Fusion]) -> str | None:
    """Why they cannot be joined; None if they can."""
    softmaxes = [fusion.weights.producer() for fusion in fusions]
    for softmax in softmaxes:
        axis = softmax.attributes.get("axis") if softmax is not None else None
        if (
            softmax is None
            or softmax.op_type != "Softmax"
            or (axis is not None and axis.as_int() not in (-1, 1))
        ):
            return "the weights of a fusion are no softmax over the experts"
        if axes_of(softmax.inputs[0]) != (fusions[0].batch, fusions[0].count):
            return "a softmax reads something of another shape than it gives"
    if len(set(softmaxes)) != len(softmaxes):
        return "two fusions use the same routing weights"
    above = {node for softmax in softmaxes if softmax is not None for node in _ancestors(softmax)}
    if any(fusion.node in above or fusion.weights.producer() in above for fusion in fusions):
        return "one gate depends on the routing weights of another"
    return None


def _ancestors(node: ir.Node) -> set[ir.Node]:
    seen: set[ir.Node] = set()
    waiting = [value.producer() for value in node.inputs if value is not None]
    while waiting:
        above = waiting.pop()
        if above is not None and above not in seen:
            seen.add(above)
            waiting += [value.producer() for value in above.inputs if value is not None]
    return seen


def _rewrite(graph: ir.Graph, fusions: list[Fusion]) -> None:
    edit = Edit(graph)
    first = fusions[0]
    tasks, count, width, batch = len(fusions), first.count, first.width, first.batch
    logits = [softmax.inputs[0] for f in fusions if (softmax := f.weights.producer()) is not None]
    cube = _logits(edit, [value for value in logits if value is not None], batch=batch, width=count)
    weights = edit.add("Softmax", [cube], (batch, tasks, count), name="gates", axis=-1)
    shape = edit.integers([-1, tasks * count], name="gates.shape")
    flat = edit.add("Reshape", [weights, shape], (batch, tasks * count), name="gates.flat")
    for fusion, piece in zip(
        fusions, edit.split(flat, [count] * tasks, batch=batch, name="gates.split"), strict=True
    ):
        edit.replace(fusion.weights, piece)
    fused = edit.add("MatMul", [weights, first.experts], (batch, tasks, width), name="fusions")
    shape = edit.integers([-1, tasks * width], name="fusions.shape")
    flat = edit.add("Reshape", [fused, shape], (batch, tasks * width), name="fusions.flat")
    for fusion, piece in zip(
        fusions, edit.split(flat, [width] * tasks, batch=batch, name="fusions.split"), strict=True
    ):
        edit.replace(fusion.fused, piece)
    edit.done()


def _logits(edit: Edit, logits: list[ir.Value], *, batch: str, width: int) -> ir.Value:
    """The logits of all gates, (B, T, K)."""
    pieces = pieces_of(logits)
    if pieces is not None:
        return as_cube(edit, pieces, [0, 1, 2], name="gates.logits")
    joined = edit.add("Concat", logits, (batch, len(logits) * width), name="gates.logits", axis=1)
    shape = edit.integers([-1, len(logits), width], name="gates.logits.shape")
    return edit.add("Reshape", [joined, shape], (batch, len(logits), width), name="gates.logits.cube")

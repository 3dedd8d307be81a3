"""Fusion, a weighted sum over the experts, is a matrix product.

    u = Unsqueeze(w (B, K), -1)                        r = Reshape(w, [-1, 1, K])
    f = ReduceSum(u · e (B, K, D), axes=[1])  (B, D)   f = Reshape(MatMul(r, e), [-1, D])

The product (B, K, D) is not written out. On a CPU a whole tail is 5 to 10% faster so, at 1, 8 and 64 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from te_export.rewrite.edit import Edit, axes_of
from te_export.rewrite.linear import only_reader
from te_export.rewrite.log import Applied, Declined, Findings

__all__ = ["RULE", "WeightedSum", "fuse_experts", "read_weighted_sum"]

RULE = "fuse_experts"


@dataclass(frozen=True)
class WeightedSum:
    """A fusion as torch has it.

    Attributes:
        total: the ReduceSum; its output is (B, D).
        product: the Mul under it.
        weights: (B, K).
        experts: (B, K, D).
        count, width: K and D.
    """

    total: ir.Node
    product: ir.Node
    weights: ir.Value
    experts: ir.Value
    batch: str
    count: int
    width: int


def fuse_experts(graph: ir.Graph) -> Findings:
    """Rewrite every fusion, in place."""
    applied: list[Applied] = []
    declined: list[Declined] = []
    edit = Edit(graph)
    for node in list(graph):
        product = _match(node)
        if product is None:
            continue
        checked = _check(node, product)
        if isinstance(checked, str):
            declined.append(Declined(RULE, str(product.name), checked))
        else:
            _rewrite(edit, checked)
            what = f"the weighted sum of {checked.count} vectors of {checked.width} became one MatMul"
            applied.append(Applied(RULE, str(product.name), what))
    if applied:
        edit.done()
    return Findings(tuple(applied), tuple(declined))


def read_weighted_sum(node: ir.Node) -> WeightedSum | None:
    """The fusion whose ReduceSum is `node`; None if it is none, or not of the form above."""
    product = _match(node)
    found = None if product is None else _check(node, product)
    return found if isinstance(found, WeightedSum) else None


def _match(total: ir.Node) -> ir.Node | None:
    """The Mul under a ReduceSum, one of whose factors is an Unsqueeze."""
    product = total.inputs[0].producer() if total.op_type == "ReduceSum" and total.inputs[0] else None
    if product is None or product.op_type != "Mul":
        return None
    producers = [value.producer() for value in product.inputs if value is not None]
    return product if any(p is not None and p.op_type == "Unsqueeze" for p in producers) else None


def _check(total: ir.Node, product: ir.Node) -> WeightedSum | str:
    if total.outputs[0].dtype != ir.DataType.FLOAT:
        return f"it sums {total.outputs[0].dtype}, expected float32"
    if only_reader(product.outputs[0]) is not total:
        return "the weighted experts are read by something else than their sum"
    keepdims = total.attributes.get("keepdims")
    axes = total.inputs[1] if len(total.inputs) > 1 else None
    tensor = ir.convenience.get_const_tensor(axes) if axes is not None else None
    if tensor is None or tensor.numpy().tolist() not in ([1], [-2]) or keepdims is None or keepdims.as_int():
        return "its products are not summed over axis 1 alone, without keeping the axis"
    for raised, experts in (tuple(product.inputs), tuple(product.inputs)[::-1]):
        unsqueeze = raised.producer() if raised is not None else None
        if unsqueeze is None or unsqueeze.op_type != "Unsqueeze" or unsqueeze.inputs[0] is None:
            continue
        weights = unsqueeze.inputs[0]
        shape, column = axes_of(experts), axes_of(raised)
        if experts is None or shape is None or column is None or len(shape) != 3 or len(column) != 3:
            continue
        batch, count, width = shape
        fits = column == (batch, count, 1) and axes_of(weights) == (batch, count)
        if fits and isinstance(count, int) and isinstance(width, int) and isinstance(batch, str):
            return WeightedSum(total, product, weights, experts, batch, count, width)
    return "its factors are not weights (batch, experts, 1) and features (batch, experts, width)"


def _rewrite(edit: Edit, fusion: WeightedSum) -> None:
    name = f"{fusion.total.name}.fusion"
    batch, count, width = fusion.batch, fusion.count, fusion.width
    row_shape = edit.integers([-1, 1, count], name=f"{name}.row_shape")
    flat_shape = edit.integers([-1, width], name=f"{name}.shape")
    row = edit.add("Reshape", [fusion.weights, row_shape], (batch, 1, count), name=f"{name}.row")
    mixed = edit.add("MatMul", [row, fusion.experts], (batch, 1, width), name=name)
    flat = edit.add("Reshape", [mixed, flat_shape], (batch, width), name=f"{name}.flat")
    edit.replace(fusion.total.outputs[0], flat)

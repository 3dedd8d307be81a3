"""Recognising a fusion as fuse_experts writes it: MatMul of routing weights (B, 1, K) and experts (B, K, D)."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from te_export.rewrite.edit import axes_of
from te_export.rewrite.linear import only_reader

__all__ = ["Fusion", "read_fusion"]


@dataclass(frozen=True)
class Fusion:
    """One task's weighted sum of the experts.

    Attributes:
        weights: (B, K).
        experts: (B, K, D).
        fused: (B, D).
    """

    node: ir.Node
    weights: ir.Value
    experts: ir.Value
    fused: ir.Value
    batch: str
    count: int
    width: int


def read_fusion(node: ir.Node) -> Fusion | None:
    """The fusion whose MatMul is `node`; None if it is none."""
    if node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    experts, row, flat = node.inputs[1], node.inputs[0].producer(), only_reader(node.outputs[0])
    if row is None or row.op_type != "Reshape" or flat is None or flat.op_type != "Reshape":
        return None
    weights, shape = row.inputs[0], axes_of(experts)
    if weights is None or shape is None or len(shape) != 3:
        return None
    batch, count, width = shape
    if not (isinstance(batch, str) and isinstance(count, int) and isinstance(width, int)):
        return None
    fits = (
        axes_of(weights) == (batch, count)
        and axes_of(node.inputs[0]) == (batch, 1, count)
        and axes_of(flat.outputs[0]) == (batch, width)
    )
    return Fusion(node, weights, experts, flat.outputs[0], batch, count, width) if fits else None

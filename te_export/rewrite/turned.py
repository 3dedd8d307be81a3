"""A linear layer with its weight stored (in, out), the order that a batched MatMul multiplies in."""

from __future__ import annotations

import onnx_ir as ir

from te_export.rewrite.edit import Edit
from te_export.rewrite.linear import Linear, tensor_of
from te_export.rewrite.stack import Part

__all__ = ["turn", "turned_name", "turned_part"]


def turned_name(weight: str) -> str:
    """What a weight is called once it is turned."""
    return f"{weight}.turned"


def turned_part(layer: Linear) -> Part:
    """The weight of `layer` as (in, out): itself, or a view that is written out turned."""
    tensor = tensor_of(layer.weight)
    name = str(layer.weight.name)
    if layer.turned:
        return Part(name, tensor)
    return Part(turned_name(name), ir.tensor(layer.weight_out_in().T, name=turned_name(name)))


def turn(edit: Edit, layer: Linear) -> tuple[str, str]:
    """Let the Gemm read its weight turned.

    Returns:
        Name of the new initializer, name of the one it was made from.
    """
    part = turned_part(layer)
    weight = edit.initializer(part.tensor, name=part.name)
    layer.node.replace_input_with(1, weight)
    layer.node.attributes["transB"] = ir.AttrInt64("transB", 0)
    return str(weight.name), str(layer.weight.name)

"""A linear layer over a sequence or a map is a linear layer over its positions.

    y = act(MatMul(x (B, L, D), Wᵀ (D, N)) + b)     r = Reshape(x, [-1, D])                              (B·L, D)
                                                    y = Reshape(act(Gemm(r, W, b, transB=1)), [-1, L, N])

So they are stacked and take a lower precision as other layers do. Layers one after another are not folded, since the
Reshape between them stays until graphs are cut: only what has the batch axis first may cross from trunk to tails. x may
have any number of axes, the batch anywhere but last; with two, (B, D), nothing is reshaped. Layers that read the same
value read one Reshape.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from te_export.rewrite.edit import Axes, Edit, axes_of
from te_export.rewrite.large_layers import SMALLEST_WEIGHT
from te_export.rewrite.linear import activated, activation_key, is_float_constant, only_reader
from te_export.rewrite.log import Applied, Declined, Findings
from te_export.rewrite.row_axis import row_axis

__all__ = ["RULE", "flatten_sequences"]

RULE = "flatten_sequences"


@dataclass(frozen=True)
class _Match:
    """A matrix product with a constant.

    Attributes:
        weight: (D, N); (N, D) where `transposed`.
    """

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    transposed: bool


@dataclass(frozen=True)
class _Layer:
    """The layer that a match is.

    Attributes:
        places: the shape of x and y without its last axis; one of its axes is symbolic.
        bias: (N,), or None.
        y: what the layer gives, with its bias.
    """

    match: _Match
    places: Axes
    width_in: int
    width_out: int
    bias: ir.Value | None
    y: ir.Value


def flatten_sequences(graph: ir.Graph) -> Findings:
    """Rewrite every matrix product with a constant, in place."""
    applied: list[Applied] = []
    declined: list[Declined] = []
    edit = Edit(graph)
    rows: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        match = _match(node)
        if match is None:
            continue
        checked = _check(match)
        if isinstance(checked, str):
            declined.append(Declined(RULE, str(node.name), checked))
        else:
            applied.append(Applied(RULE, _name(checked), _rewrite(edit, checked, rows)))
    if applied:
        edit.done()
    return Findings(tuple(applied), tuple(declined))


def _match(node: ir.Node) -> _Match | None:
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
        return None
    x, weight = node.inputs
    if x is None or weight is None:
        return None
    above = weight.producer()
    transposed = above is not None and above.op_type == "Transpose" and _swaps_both(above)
    if above is not None and transposed:
        (weight,) = above.inputs
    if weight is None or not is_float_constant(weight, rank=2):
        return None
    return _Match(node, x, weight, transposed)


def _swaps_both(transpose: ir.Node) -> bool:
    order = transpose.attributes.get("perm")
    return order is None or list(order.as_ints()) == [1, 0]


def _check(match: _Match) -> _Layer | str:
    axes = axes_of(match.x)
    if axes is None or len(axes) < 2:
        return "the shape of what it reads is not known"
    *places, width_in = axes
    if sum(isinstance(axis, str) for axis in places) != 1 or not isinstance(width_in, int) or 0 in axes:
        return f"what it reads, {list(axes)}, has not one axis of unknown length"
    assert match.weight.shape is not None  # an initializer has a shape
    sizes = [int(axis) for axis in match.weight.shape.numpy()]
    width_out = sizes[0] if match.transposed else sizes[1]
    bias, y = _biased(match.node.outputs[0], width_out)
    if bias is None and len(places) > 1 and width_in * width_out < SMALLEST_WEIGHT:
        return "it is small and has no bias, so that nothing would be gained"
    return _Layer(match, tuple(places), width_in, width_out, bias, y)


def _biased(product: ir.Value, width: int) -> tuple[ir.Value | None, ir.Value]:
    """The constant (width,) that is added to a product, and the sum; None and the product if there is none."""
    add = only_reader(product)
    if add is not None and add.op_type == "Add":
        for value in add.inputs:
            if value is not None and is_float_constant(value, rank=1) and axes_of(value) == (width,):
                return value, add.outputs[0]
    return None, product


def _rewrite(edit: Edit, layer: _Layer, rows: dict[ir.Value, ir.Value]) -> str:
    name, x = _name(layer), layer.match.x
    flat = len(layer.places) == 1
    if x not in rows:
        rows[x] = x if flat else _rows(edit, x, layer, name)
    inputs = [rows[x], layer.match.weight, *([] if layer.bias is None else [layer.bias])]
    axis = row_axis(layer.places)
    end = layer.y
    y = edit.add(
        "Gemm", inputs, (axis, layer.width_out), name=f"{name}.linear", transB=int(layer.match.transposed)
    )
    activation = only_reader(end) if activation_key(end) is not None else None
    if activation is not None and not flat:
        y = edit.like(activation, y, name=f"{name}.activation")
        end = activated(end)
    if not flat:
        shape = [axis if isinstance(axis, int) else -1 for axis in (*layer.places, layer.width_out)]
        size = edit.integers(shape, name=f"{name}.shape")
        y = edit.add("Reshape", [y, size], (*layer.places, layer.width_out), name=f"{name}.places")
    edit.replace(end, y)
    where = "rows" if flat else f"the places of {list(layer.places)}"
    return f"a matrix product with a constant became a layer {layer.width_out}x{layer.width_in} over {where}"


def _rows(edit: Edit, x: ir.Value, layer: _Layer, name: str) -> ir.Value:
    shape = edit.integers([-1, layer.width_in], name=f"{name}.rows_shape")
    axes = (row_axis(layer.places), layer.width_in)
    return edit.add("Reshape", [x, shape], axes, name=f"{name}.rows")


def _name(layer: _Layer) -> str:
    """The name of the module that the weight is a parameter of; the node's own where there is none."""
    return str(layer.match.weight.name).rpartition(".")[0] or str(layer.match.node.name)

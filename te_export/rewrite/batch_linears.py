"""Equal linear layers, each reading its own piece of one value, are one batched matrix product.

    p_0, … = Split(s (B, T·D), axis=1)          c (T, B, D) = Transpose(Reshape(s, [-1, T, D]), 1 0 2)
    y_i = act(p_i·W_iᵀ + b_i)  (B, O)           y = act(MatMul(c, W (T, D, O)) + b (T, 1, O))
                                                y_0, … = Split(Reshape(Transpose(y, 1 0 2), [-1, T·O]), axis=1)

That is the form where weights are stored (in, out). Where they are stored (out, in), as torch has them, the
product is taken from the left, W (T, O, D) · c (T, D, B), so that either way W is the concatenation of the
bytes of the W_i and nothing is stored twice. Before the cut, where no graph keeps the layers apart, weights
are turned to (in, out) first. Whether it is faster is batching_policy.py's to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from te_export.rewrite.batching_policy import worth_batching
from te_export.rewrite.edit import Edit, joined_name
from te_export.rewrite.linear import Linear, activated, activation_key, only_reader, read_linear, tensor_of
from te_export.rewrite.log import Applied, Declined, Findings
from te_export.rewrite.pieces import Pieces, as_cube, read_split
from te_export.rewrite.served_outputs import served_outputs
from te_export.rewrite.stack import Part, stack_tensors
from te_export.rewrite.turned import turned_part
from te_runtime.manifest import TargetProvider

__all__ = ["RULE", "batch_linears"]

RULE = "batch_linears"


@dataclass(frozen=True)
class _Batch:
    pieces: Pieces
    layers: tuple[Linear, ...]

    @property
    def name(self) -> str:
        return joined_name([layer.name for layer in self.layers])


def batch_linears(graph: ir.Graph, *, provider: TargetProvider, before_cut: bool) -> Findings:
    """Batch every group of equal linear layers that gets faster by it, in place."""
    served = served_outputs(graph) if before_cut else {}
    applied: list[Applied] = []
    declined: list[Declined] = []
    sources: dict[str, tuple[str, ...]] = {}
    for node in list(graph):
        nodes = _match(node)
        if nodes is None:
            continue
        checked = _check(node, nodes, served, provider)
        if isinstance(checked, str):
            declined.append(Declined(RULE, str(nodes[0].name), checked))
            continue
        sources |= _rewrite(graph, checked, turn=before_cut)
        layer = checked.layers[0]
        what = f"{len(nodes)} layers {layer.width_out}x{layer.width_in} became one batched MatMul"
        applied.append(Applied(RULE, layer.name, what))
    return Findings(tuple(applied), tuple(declined), sources)


def _match(split: ir.Node) -> list[ir.Node] | None:
    """The Gemms that read the pieces of a Split, one each."""
    if split.op_type != "Split" or len(split.outputs) < 2:
        return None
    readers = [only_reader(value) for value in split.outputs]
    found = [reader for reader in readers if reader is not None and reader.op_type == "Gemm"]
    return found if len(found) == len(readers) else None


def _check(
    split: ir.Node, nodes: list[ir.Node], served: Mapping[ir.Node, int], provider: TargetProvider
) -> _Batch | str:
    pieces = read_split(split)
    if pieces is None:
        return "the layers read pieces of different widths"
    layers: list[Linear] = []
    for node, piece in zip(nodes, pieces.values, strict=True):
        layer = read_linear(node)
        if isinstance(layer, str):
            return f"{node.name}: {layer}"
        if layer.x is not piece or layer.bias is None:
            return f"{node.name} has no bias"
        layers.append(layer)
    shapes = {(layer.width_in, layer.width_out, layer.turned) for layer in layers}
    if len(shapes) > 1:
        widths = sorted({layer.width_out for layer in layers})
        return f"the layers differ: their outputs are {', '.join(map(str, widths))} wide"
    if len({served.get(node) for node in nodes}) > 1:
        return "the layers serve different tasks, so only the joint graph can batch them"
    weights = layers[0].width_in * layers[0].width_out
    if not worth_batching(len(layers), weights, provider):
        return f"{len(layers)} layers of {weights:,} weights are faster apart on {provider}"
    return _Batch(pieces, tuple(layers))


def _rewrite(graph: ir.Graph, batch: _Batch, *, turn: bool) -> dict[str, tuple[str, ...]]:
    edit = Edit(graph)
    count, layer, rows = batch.pieces.count, batch.layers[0], batch.pieces.batch
    name, width = batch.name, batch.layers[0].width_out
    right = turn or layer.turned
    weight, sources = _weights(edit, batch, right=right)
    biases = [one.bias for one in batch.layers if one.bias is not None]
    bias = _stack(edit, biases, [count, 1, width] if right else [count, width, 1])
    order = [1, 0, 2] if right else [1, 2, 0]
    inputs = as_cube(edit, batch.pieces, order, name=f"{name}.input")
    axes = (count, rows, width) if right else (count, width, rows)
    product = edit.add("MatMul", [inputs, weight] if right else [weight, inputs], axes, name=name)
    total = edit.add("Add", [product, bias], axes, name=f"{name}.bias")
    ends = [one.y for one in batch.layers]
    keys = {activation_key(end) for end in ends}
    activation = only_reader(ends[0]) if None not in keys and len(keys) == 1 else None
    if activation is not None:
        total = edit.like(activation, total, name=f"{name}.activation")
        ends = [activated(end) for end in ends]
    back = [1, 0, 2] if right else [2, 0, 1]
    cube = edit.add("Transpose", [total], (rows, count, width), name=f"{name}.turn", perm=back)
    size = edit.integers([-1, count * width], name=f"{name}.shape")
    flat = edit.add("Reshape", [cube, size], (rows, count * width), name=f"{name}.flat")
    for end, piece in zip(
        ends, edit.split(flat, [width] * count, batch=rows, name=f"{name}.split"), strict=True
    ):
        edit.replace(end, piece)
    edit.done()
    return sources


def _weights(edit: Edit, batch: _Batch, *, right: bool) -> tuple[ir.Value, dict[str, tuple[str, ...]]]:
    layer, count = batch.layers[0], batch.pieces.count
    if not right:
        return _stack(
            edit, [one.weight for one in batch.layers], [count, layer.width_out, layer.width_in]
        ), {}
    parts = [turned_part(one) for one in batch.layers]
    sources: dict[str, tuple[str, ...]] = {
        part.name: (str(one.weight.name),)
        for part, one in zip(parts, batch.layers, strict=True)
        if part.name != one.weight.name
    }
    name = joined_name([part.name for part in parts])
    return edit.initializer(
        stack_tensors(name, parts, [count, layer.width_in, layer.width_out]), name=name
    ), sources


def _stack(edit: Edit, values: list[ir.Value], axes: list[int]) -> ir.Value:
    parts = [Part(str(value.name), tensor_of(value)) for value in values]
    name = joined_name([part.name for part in parts])
    return edit.initializer(stack_tensors(name, parts, axes), name=name)

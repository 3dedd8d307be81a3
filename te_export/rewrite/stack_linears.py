"""Linear layers that read the same value are one linear layer and a Split.

    y_i = act(x·W_iᵀ + b_i)   for i = 0 … T-1        s = act(x·Wᵀ + b),  W = rows of W_0, W_1, …
                                                     y_0, … = Split(s, axis=1)

Nothing is computed: the stacked weight is the concatenation of the bytes of the W_i, which keep their names
in weights.bin. All layers of a stack have the same activation, or none, and all are large or all are small, so that
a lower precision can hold the whole of it: the experts' first layers stay apart from gates that read the same value.
Before the cut they must also serve the same outputs, or a task graph would compute the layers of other tasks. A graph
that shares the stacks of others, with some layers gone, stacks those alone that lie one after another there, so that
no weight is stored again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from te_export.rewrite.edit import Edit, joined_name
from te_export.rewrite.large_layers import SMALLEST_WEIGHT, is_large
from te_export.rewrite.linear import Linear, activated, activation_key, only_reader, read_linear, tensor_of
from te_export.rewrite.log import Applied, Declined, Findings
from te_export.rewrite.served_outputs import served_outputs
from te_export.rewrite.stack import Part, stack_of, stack_tensors

__all__ = ["RULE", "stack_linears"]

RULE = "stack_linears"


@dataclass(frozen=True)
class _Kind:
    """What layers that are stacked have in common.

    Attributes:
        served: the graph's outputs, as a bit mask; None after the cut.
        activation: as activation_key gives it.
        large: whether a lower precision would convert them.
        run: which run of neighbours among the weights they are in.
    """

    served: int | None
    activation: tuple[str, ...] | None
    large: bool
    run: int


def stack_linears(
    graph: ir.Graph, *, before_cut: bool, laid_out: Mapping[str, int] | None = None
) -> Findings:
    """Stack every group of linear layers that read one value, in place.

    Args:
        before_cut: whether task graphs are still to be cut out.
        laid_out: where weights already lie, by name: neighbours have consecutive numbers. None for nowhere.
    """
    served = served_outputs(graph) if before_cut else {}
    applied: list[Applied] = []
    declined: list[Declined] = []
    for layers, refused in _groups(graph):
        declined += refused
        kinds: dict[_Kind, list[Linear]] = {}
        for layer, run in zip(layers, _runs(layers, laid_out or {}), strict=True):
            kind = _Kind(served.get(layer.node), activation_key(layer.y), is_large(layer), run)
            kinds.setdefault(kind, []).append(layer)
        for alike in kinds.values():
            if len(alike) > 1:
                applied.append(Applied(RULE, alike[0].name, _rewrite(graph, alike)))
        alone = [alike[0] for alike in kinds.values() if len(alike) == 1]
        if len(kinds) > 1 and alone:
            declined.append(Declined(RULE, alone[0].name, _why_alone(list(kinds))))
    return Findings(tuple(applied), tuple(declined))


def _groups(graph: ir.Graph) -> list[tuple[list[Linear], list[Declined]]]:
    """Two or more Gemms that read the same value: those that can be stacked, and why others cannot."""
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if node.op_type == "Gemm" and node.inputs[0] is not None:
            readers.setdefault(node.inputs[0], []).append(node)
    groups = []
    for nodes in readers.values():
        if len(nodes) < 2:
            continue
        layers: list[Linear] = []
        refused: list[Declined] = []
        for node in nodes:
            layer = _check(node)
            if isinstance(layer, str):
                refused.append(Declined(RULE, str(node.name), layer))
            else:
                layers.append(layer)
        groups.append((layers, refused))
    return groups


def _check(node: ir.Node) -> Linear | str:
    layer = read_linear(node)
    if isinstance(layer, str):
        return layer
    if layer.turned:
        return "its weight is stored (in, out), so its rows cannot be stacked"
    if layer.bias is None:
        return "it has no bias"
    return layer


def _runs(layers: list[Linear], laid_out: Mapping[str, int]) -> list[int]:
    """For each layer, which run of neighbours it is in: 0 for all whose weights lie nowhere yet."""
    runs: list[int] = []
    end: int | None = None
    count = 0
    for layer in layers:
        names = _part_names(layer.weight)
        begin = laid_out.get(names[0])
        if begin is not None and begin != end:
            count += 1
        runs.append(0 if begin is None else count)
        end = None if begin is None else begin + len(names)
    return runs


def _part_names(weight: ir.Value) -> list[str]:
    """The names of the parts of a stack, or of the one weight there is."""
    stack = stack_of(weight.const_value)
    return [str(weight.name)] if stack is None else [part.name for part in stack.parts]


def _why_alone(kinds: Sequence[_Kind]) -> str:
    """What tells the layers apart that read one value."""
    if len({kind.activation for kind in kinds}) > 1:
        return "the layers that read the same value are followed by different activations"
    if len({kind.served for kind in kinds}) > 1:
        return "the layers that read the same value serve different tasks, so only the joint graph can stack them"
    if len({kind.large for kind in kinds}) > 1:
        return (
            f"of the layers that read the same value some have {SMALLEST_WEIGHT:,} weights and more, which a lower "
            "precision holds otherwise"
        )
    return "the layers that read the same value do not lie one after another among the weights"


def _rewrite(graph: ir.Graph, layers: list[Linear]) -> str:
    edit = Edit(graph)
    name = joined_name([layer.name for layer in layers])
    rows = sum(layer.width_out for layer in layers)
    batch = layers[0].axes[0]
    stacked = edit.add(
        "Gemm",
        [layers[0].x, _stack(edit, [layer.weight for layer in layers], [rows, layers[0].width_in]),
         _stack(edit, [layer.bias for layer in layers if layer.bias is not None], [rows])],
        (batch, rows), name=name, transB=1,
    )  # fmt: skip
    ends = [layer.y for layer in layers]
    activation = only_reader(ends[0]) if activation_key(ends[0]) is not None else None
    if activation is not None:
        stacked = edit.like(activation, stacked, name=f"{name}.activation")
        ends = [activated(end) for end in ends]
    pieces = edit.split(stacked, [layer.width_out for layer in layers], batch=batch, name=f"{name}.split")
    for end, piece in zip(ends, pieces, strict=True):
        edit.replace(end, piece)
    edit.done()
    return f"{len(layers)} layers became one Gemm {rows}x{layers[0].width_in} and a Split"


def _stack(edit: Edit, values: list[ir.Value], axes: list[int]) -> ir.Value:
    parts = [Part(str(value.name), tensor_of(value)) for value in values]
    name = joined_name([part.name for part in parts])
    return edit.initializer(stack_tensors(name, parts, axes), name=name)

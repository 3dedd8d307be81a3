"""Planning: which linear layers become a convolution, and which of them become one together.

    Gemm (→ activation)                               → one convolution
    Split(s, axis=1) → K equal Gemms (→ activations)  → one convolution of K groups, which reads s
    → K equal Gemms (→ activations), one per output   → one convolution of K groups, which reads those outputs

Nothing is changed here. A layer that fits no pattern stands alone, so every layer is in exactly one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from te_export.precision.layers import linear_layers, weight_names
from te_export.rewrite.linear import Linear, activated, activation_key, only_reader
from te_export.rewrite.pieces import read_split

__all__ = ["ConvLayer", "joined_by", "plan_layers"]

_Kind = Callable[[Linear], Hashable | None]


@dataclass(frozen=True)
class ConvLayer:
    """Linear layers that become one convolution.

    Attributes:
        linears: one, or the K equal layers of a group, in order.
        activation: the node after the first of them; the others are followed by the same. None if there is
            none, or if something else reads the layer too.
        outputs: (B, N) of each layer, after its activation.
    """

    linears: tuple[Linear, ...]
    activation: ir.Node | None
    outputs: tuple[ir.Value, ...]

    @property
    def name(self) -> str:
        return self.linears[0].name

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """(B, C) of each layer."""
        return tuple(linear.x for linear in self.linears)

    @property
    def batch(self) -> int | str:
        return self.linears[0].axes[0]

    @property
    def width_in(self) -> int:
        """Of all layers together."""
        return sum(linear.width_in for linear in self.linears)

    @property
    def width_out(self) -> int:
        """Of all layers together."""
        return sum(linear.width_out for linear in self.linears)

    @property
    def weights(self) -> tuple[str, ...]:
        """As `weight_names`, of all layers."""
        return tuple(name for linear in self.linears for name in weight_names(linear))

    @property
    def followed_by_relu(self) -> bool:
        return self.activation is not None and self.activation.op_type == "Relu"

    @property
    def quantized_outputs(self) -> tuple[ir.Value, ...]:
        """(B, N) of each layer: what leaves the convolution, after a Relu, before any other activation."""
        return self.outputs if self.followed_by_relu else tuple(linear.y for linear in self.linears)


def plan_layers(graph: ir.Graph, kind: _Kind | None = None) -> list[ConvLayer]:
    """The convolutions to make of a graph, each after those it reads.

    Args:
        kind: what the layers of a group agree on; None for a layer that is not to be converted. Without it,
            all are converted.
    """
    kinds = {linear: kind(linear) if kind else () for linear in linear_layers(graph)}
    linears = [linear for linear, found in kinds.items() if found is not None]
    groups = list(_groups(graph, linears, kinds))
    grouped = {linear for layer in groups for linear in layer.linears}
    layers = groups + [_layer((linear,)) for linear in linears if linear not in grouped]
    order = {node: index for index, node in enumerate(graph)}
    return sorted(layers, key=lambda layer: order[layer.linears[0].node])


def joined_by(values: Sequence[ir.Value]) -> Iterator[ir.Value]:
    """What puts the values (B, N_i), all of them and in order, into one (B, Σ N_i)."""
    for node, _ in values[0].uses():
        if node.op_type == "Concat" and tuple(node.inputs) == tuple(values):
            axis = node.attributes["axis"].as_int()
            rank = None if values[0].shape is None else len(values[0].shape)
            if rank == 2 and axis in (1, -1):
                yield node.outputs[0]


def _groups(
    graph: ir.Graph, linears: Sequence[Linear], kinds: Mapping[Linear, Hashable]
) -> Iterator[ConvLayer]:
    readers: dict[ir.Value, list[Linear]] = {}
    for linear in linears:
        readers.setdefault(linear.x, []).append(linear)
    waiting = [pieces.values for node in graph if (pieces := read_split(node)) is not None]
    while waiting:
        found = [readers.get(value, []) for value in waiting.pop()]
        if len(found) < 2 or len({len(of_one) for of_one in found}) > 1:
            continue
        for members in zip(*found, strict=True):
            alike = {
                (linear.width_in, linear.width_out, activation_key(linear.y), kinds[linear])
                for linear in members
            }
            if len(alike) == 1:
                layer = _layer(members)
                waiting.append(layer.outputs)
                yield layer


def _layer(linears: tuple[Linear, ...]) -> ConvLayer:
    ends = tuple(linear.y for linear in linears)
    if activation_key(ends[0]) is None:
        return ConvLayer(linears, None, ends)
    return ConvLayer(linears, only_reader(ends[0]), tuple(activated(end) for end in ends))

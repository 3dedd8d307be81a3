"""Finding experts and the sum of them in one task's captured graph, by what its nodes are and read, never by names.

    e_i (B, 1, D) → Concat → e (B, K, D) → … → f: the value of one expert's size that everything made of e goes through
                             e           → Reshape → (B, K·D) → Gemm: first layers of a gate that reads the experts

That f is Σ_i w_i·e_i is not read off the operators between, which may multiply and sum, be a matrix product or gather the
experts that a row chose: means_trial.py computes it from the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from te_export.partition import ROUTING_WEIGHTS
from te_export.rewrite.edit import Axes, axes_of
from te_export.rewrite.linear import Linear, read_linear

__all__ = ["Mixture", "find_mixtures"]


@dataclass(frozen=True)
class Mixture:
    """Where experts enter a task graph.

    Attributes:
        joined: for each expert the Concat that its features (B, 1, D) enter, and the place of that input.
        features: all of them, (B, K, D).
        readers: the nodes that read the features on the way to their sum, each with the place of that input.
        fused: the sum of the experts by the routing weights: (B, D), or with an axis of length 1 in it.
        weights: the routing weights, (B, K), an output of the graph.
        gate: the linear layers that read the features as (B, K·D), expert by expert.
        batch: the name of the batch axis.
        width: D.
    """

    joined: tuple[tuple[ir.Node, int], ...]
    features: ir.Value
    readers: tuple[tuple[ir.Node, int], ...]
    fused: ir.Value
    weights: ir.Value
    gate: tuple[Linear, ...]
    batch: str
    width: int

    @property
    def count(self) -> int:
        """K."""
        return len(self.joined)

    @property
    def rows(self) -> tuple[ir.Value, ...]:
        """The features of each expert, K of (B, 1, D)."""
        return tuple(_input_of(node, place) for node, place in self.joined)


def find_mixtures(graph: ir.Graph) -> tuple[Mixture, ...]:
    """What may be the mixture of a task graph as captured, nearest to the prediction first."""
    weights = next((value for value in graph.outputs if value.name == ROUTING_WEIGHTS), None)
    axes = axes_of(weights)
    if weights is None or axes is None or len(axes) != 2 or weights.dtype != ir.DataType.FLOAT:
        return ()
    stacks = (node for node in reversed(graph) if node.op_type == "Concat")
    return tuple(found for node in stacks if (found := _read(graph, node.outputs[0], weights)) is not None)


def _read(graph: ir.Graph, features: ir.Value, weights: ir.Value) -> Mixture | None:
    axes, of_weights = axes_of(features), axes_of(weights)
    if axes is None or of_weights is None or len(axes) != 3 or axes[:2] != of_weights:
        return None
    batch, count, width = axes
    joined = tuple(_leaves(features))
    if not isinstance(batch, str) or not isinstance(width, int) or len(joined) != count:
        return None
    rows = [_input_of(node, place) for node, place in joined]
    if any(axes_of(row) != (batch, 1, width) for row in rows) or features.is_graph_output():
        return None
    gate: list[Linear] = []
    readers: list[tuple[ir.Node, int]] = []
    for use in features.uses():
        layers = _gate_layers(use.node, (batch, len(rows) * width))
        if layers:
            gate += layers
        else:
            readers.append((use.node, use.idx))
    fused = _exit(graph, [node for node, _ in readers], (batch, width))
    if fused is None or features.dtype != ir.DataType.FLOAT or fused in _above(weights):
        return None
    return Mixture(joined, features, tuple(readers), fused, weights, tuple(gate), batch, width)


def _leaves(joined: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """What was joined along the experts' axis, also by one Concat after another that nothing else reads."""
    node = joined.producer()
    if node is None or not _joins_experts(node):
        return
    for place, value in enumerate(node.inputs):
        above = value.producer() if value is not None else None
        if value is not None and above is not None and _joins_experts(above) and len(value.uses()) == 1:
            yield from _leaves(value)
        else:
            yield node, place


def _joins_experts(node: ir.Node) -> bool:
    return node.op_type == "Concat" and node.attributes["axis"].as_int() in (1, -2)


def _input_of(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    assert value is not None  # a Concat has no inputs that are left out
    return value


def _gate_layers(node: ir.Node, axes: Axes) -> list[Linear]:
    """The linear layers that read the flattened features which `node` makes; none where anything else reads them."""
    flat = node.outputs[0]
    if node.op_type != "Reshape" or axes_of(flat) != axes or flat.is_graph_output():
        return []
    layers = [read_linear(use.node) for use in flat.uses()]
    found = [layer for layer in layers if not isinstance(layer, str) and layer.x is flat]
    return found if len(found) == len(layers) else []


def _exit(graph: ir.Graph, readers: list[ir.Node], axes: Axes) -> ir.Value | None:
    """The first value of one expert's size without which nothing that `readers` make reaches an output."""
    batch, width = axes
    sizes = {axes, (batch, 1, width), (batch, width, 1)}
    below = _below(readers)
    for node in graph:
        for value in node.outputs if node in below else ():
            if value.dtype == ir.DataType.FLOAT and axes_of(value) in sizes and _is_passed(readers, value):
                return value
    return None


def _below(readers: list[ir.Node]) -> set[ir.Node]:
    """The nodes themselves, and all that read what they make."""
    found: set[ir.Node] = set()
    waiting = list(readers)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [use.node for value in node.outputs for use in value.uses()]
    return found


def _is_passed(readers: list[ir.Node], gate: ir.Value) -> bool:
    """Whether every way from `readers` to an output of the graph leads through `gate`."""
    seen: set[ir.Node] = set()
    waiting = list(readers)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        for value in node.outputs:
            if value is gate:
                continue
            if value.is_graph_output():
                return False
            waiting += [use.node for use in value.uses()]
    return True


def _above(value: ir.Value) -> set[ir.Value]:
    """What a value is made of."""
    found: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            node = current.producer()
            waiting += [one for one in node.inputs if one is not None] if node is not None else []
    return found

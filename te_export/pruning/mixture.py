"""Finding gate, experts and fusion in one task's captured graph, by what its nodes are and read, never by names.

e_i (B, 1, D) → Concat → e (B, K, D) → Mul by the routing weights, ReduceSum → fused features (B, D)
                         e           → Reshape → (B, K·D) → Gemm: the gate's first layer
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from te_export.partition import ROUTING_WEIGHTS
from te_export.rewrite.edit import axes_of
from te_export.rewrite.fuse_experts import WeightedSum, read_weighted_sum
from te_export.rewrite.linear import Linear, read_linear

__all__ = ["Mixture", "find_mixture"]


@dataclass(frozen=True)
class Mixture:
    """Where experts enter a task graph.

    Attributes:
        stack: the Concat of the experts' features, K of (B, 1, D) to (B, K, D).
        fusion: the only reader of the features beside the gate.
        gate: the linear layers that read the features as (B, K·D), expert by expert.
    """

    stack: ir.Node
    fusion: WeightedSum
    gate: tuple[Linear, ...]

    @property
    def count(self) -> int:
        return self.fusion.count

    @property
    def width(self) -> int:
        return self.fusion.width


def find_mixture(graph: ir.Graph) -> Mixture | str:
    """The mixture of a task graph as captured, or why it is not one whose experts can be taken out."""
    fusions = [found for node in graph if (found := read_weighted_sum(node)) is not None]
    if len(fusions) != 1:
        return f"it has {len(fusions)} weighted sums of experts, expected one"
    (fusion,) = fusions
    if fusion.weights.name != ROUTING_WEIGHTS or not fusion.weights.is_graph_output():
        return "the experts are not summed by the routing weights that the graph gives"
    stack = fusion.experts.producer()
    if stack is None or not _stacks_experts(stack, fusion):
        return "the features of the experts are not one Concat of a row for each"
    gate: list[Linear] = []
    for use in fusion.experts.uses():
        if use.node is fusion.product:
            continue
        layers = _gate_layers(use.node, fusion)
        if isinstance(layers, str):
            return layers
        gate += layers
    return Mixture(stack, fusion, tuple(gate))


def _stacks_experts(stack: ir.Node, fusion: WeightedSum) -> bool:
    row = (fusion.batch, 1, fusion.width)
    return (
        stack.op_type == "Concat"
        and stack.attributes["axis"].as_int() in (1, -2)
        and len(stack.inputs) == fusion.count
        and all(axes_of(value) == row for value in stack.inputs)
        and not fusion.experts.is_graph_output()
    )


def _gate_layers(node: ir.Node, fusion: WeightedSum) -> list[Linear] | str:
    """The linear layers that read the flattened features which `node` makes."""
    flat = node.outputs[0]
    if (
        node.op_type != "Reshape"
        or axes_of(flat) != (fusion.batch, fusion.count * fusion.width)
        or flat.is_graph_output()
    ):
        return (
            f"{node.op_type} {node.name} reads the features of the experts, expected the fusion and the gate"
        )
    layers: list[Linear] = []
    for use in flat.uses():
        layer = read_linear(use.node)
        if isinstance(layer, str):
            return f"{use.node.name} reads the features of all experts: {layer}"
        if layer.x is not flat:
            return f"{use.node.name} reads the features of all experts, but not as its input"
        layers.append(layer)
    return layers

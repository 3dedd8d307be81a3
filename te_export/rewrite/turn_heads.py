"""Heads that the joint graph will batch store their weights (in, out) in every graph.

    y_t = Gemm(f_t, W_t (out, in), transB=1)     y_t = Gemm(f_t, W_tᵀ (in, out), transB=0)

for each task t whose f_t is a fusion of the same experts, layer by layer for as long as the heads are alike.
A batched MatMul is fastest from the right, with weights (T, in, out); as onnxruntime prepacks the weight of a
Gemm, a task graph does not mind in which order it is stored, so all graphs share the one copy.
"""

from __future__ import annotations

import onnx_ir as ir

from te_export.rewrite.batching_policy import worth_batching
from te_export.rewrite.edit import Edit
from te_export.rewrite.fusion import read_fusion
from te_export.rewrite.linear import ACTIVATIONS, Linear, only_reader, read_linear
from te_export.rewrite.log import Applied, Declined, Findings
from te_export.rewrite.turned import turn
from te_runtime.manifest import TargetProvider

__all__ = ["RULE", "turn_heads"]

RULE = "turn_heads"


def turn_heads(graph: ir.Graph, *, provider: TargetProvider) -> Findings:
    """Turn the weights of heads that will be batched, in place."""
    applied: list[Applied] = []
    declined: list[Declined] = []
    sources: dict[str, tuple[str, ...]] = {}
    edit = Edit(graph)
    for fused in _match(graph):
        ends = fused
        while ends:
            nodes = [only_reader(end) for end in ends]
            if not any(node is not None and node.op_type == "Gemm" for node in nodes):
                break
            layers = _check(nodes, provider)
            if isinstance(layers, str):
                first = next(node for node in nodes if node is not None)
                declined.append(Declined(RULE, str(first.name), layers))
                break
            ends = [_after(layer) for layer in layers]
            if all(layer.turned for layer in layers):
                continue
            for layer in layers:
                new, old = turn(edit, layer)
                sources[new] = (old,)
            what = (
                f"the weights of {len(layers)} heads are stored (in, out), to be batched in the joint graph"
            )
            applied.append(Applied(RULE, layers[0].name, what))
    if applied:
        edit.done()
    return Findings(tuple(applied), tuple(declined), sources)


def _match(graph: ir.Graph) -> list[list[ir.Value]]:
    """What fusions of the same experts give, for each set of experts that has two fusions or more."""
    groups: dict[ir.Value, list[ir.Value]] = {}
    for node in graph:
        fusion = read_fusion(node)
        if fusion is not None:
            groups.setdefault(fusion.experts, []).append(fusion.fused)
    return [group for group in groups.values() if len(group) > 1]


def _check(nodes: list[ir.Node | None], provider: TargetProvider) -> list[Linear] | str:
    layers: list[Linear] = []
    for node in nodes:
        layer = read_linear(node) if node is not None else "what it reads is read elsewhere too"
        if isinstance(layer, str):
            return f"the heads differ: {layer}"
        if layer.bias is None:
            return "the heads have no bias"
        layers.append(layer)
    if len({(layer.width_in, layer.width_out, layer.turned) for layer in layers}) > 1:
        widths = sorted({layer.width_out for layer in layers})
        return f"the heads differ: their layers are {', '.join(map(str, widths))} wide"
    weights = layers[0].width_in * layers[0].width_out
    if not worth_batching(len(layers), weights, provider):
        return f"{len(layers)} layers of {weights:,} weights are faster apart on {provider}"
    return layers


def _after(layer: Linear) -> ir.Value:
    """What the layer gives, after its activation if it has one."""
    reader = only_reader(layer.y)
    return reader.outputs[0] if reader is not None and reader.op_type in ACTIVATIONS else layer.y

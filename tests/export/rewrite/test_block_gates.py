"""The tails of all tasks as one block, and heads stored the way the block wants them."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import onnx_ir as ir
import pytest

from te_export.rewrite.block_gates import block_gates
from te_export.rewrite.fuse_experts import fuse_experts
from te_export.rewrite.turn_heads import turn_heads

turn_for_cuda = partial(turn_heads, provider="cuda")


def fused_mixture(nets: ModuleType, **kept: Any) -> ir.Graph:
    graph: ir.Graph = nets.mixture(**kept)
    fuse_experts(graph)
    return graph


def test_softmaxes_and_fusions_become_one_of_each(nets: ModuleType) -> None:
    graph = fused_mixture(nets)

    found = block_gates(graph)

    counts = nets.operators(graph)
    assert (counts["Softmax"], counts["MatMul"]) == (1, 1)
    assert [entry.where for entry in found.applied] == ["fusion_0.sum.fusion"]
    nets.assert_same(nets.mixture(), graph)
    nets.assert_settled(block_gates, graph)


def test_one_task_is_left_as_it_is(nets: ModuleType) -> None:
    graph = fused_mixture(nets, tasks=1)

    assert block_gates(graph) == type(block_gates(graph))()


def sigmoid(graph: ir.Graph) -> None:
    (softmax,) = [node for node in graph if node.name == "softmax_1"]
    softmax.op_type = "Sigmoid"
    softmax.attributes.clear()


def over_rows(graph: ir.Graph) -> None:
    (softmax,) = [node for node in graph if node.name == "softmax_1"]
    softmax.attributes["axis"] = ir.AttrInt64("axis", 0)


def one_gate_for_two(graph: ir.Graph) -> None:
    rows = [node for node in graph if node.op_type == "Reshape" and str(node.name).endswith(".row")]
    rows[1].replace_input_with(0, rows[0].inputs[0])


def gate_reads_gate(graph: ir.Graph) -> None:
    gates = {node.name: node for node in graph if str(node.name).startswith(("g1.1", "softmax_"))}
    gate, softmax = gates["g1.1"], gates["softmax_1"]
    total = ir.Node("", "Add", [gate.outputs[0], gates["softmax_0"].outputs[0]], name="hierarchy")
    total.outputs[0].shape = ir.Shape(["batch", 3])
    total.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.append(total)
    softmax.replace_input_with(0, total.outputs[0])
    graph.sort()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (sigmoid, "no softmax over the experts"),
        (over_rows, "no softmax over the experts"),
        (one_gate_for_two, "use the same routing weights"),
        (gate_reads_gate, "one gate depends on the routing weights of another"),
    ],
)
def test_gates_that_cannot_be_joined_are_left(nets: ModuleType, change: Any, reason: str) -> None:
    graph = fused_mixture(nets)
    change(graph)
    before = nets.operators(graph)

    found = block_gates(graph)

    assert found.applied == ()
    assert [entry.where for entry in found.declined] == ["fusion_0.sum.fusion"]
    assert reason in found.declined[0].reason
    assert nets.operators(graph) == before


def test_equal_heads_are_turned_layer_by_layer(nets: ModuleType) -> None:
    graph = fused_mixture(nets)

    found = turn_for_cuda(graph)

    assert [entry.where for entry in found.applied] == ["h0.0", "h0.1"]
    assert found.sources["h2.1.weight.turned"] == ("h2.1.weight",)
    nets.assert_same(nets.mixture(), graph)
    nets.assert_settled(turn_for_cuda, graph)


def test_heads_of_different_widths_are_turned_as_far_as_they_are_alike(nets: ModuleType) -> None:
    graph = fused_mixture(nets, outputs=(2, 3, 2))

    found = turn_for_cuda(graph)

    assert [entry.where for entry in found.applied] == ["h0.0"]
    assert [(entry.where, entry.reason) for entry in found.declined] == [
        ("h0.1", "the heads differ: their layers are 2, 3 wide")
    ]
    nets.assert_same(nets.mixture(outputs=(2, 3, 2)), graph)

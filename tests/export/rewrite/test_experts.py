"""Assembling and fusing experts, and dropping what was only reshaped."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from te_export.rewrite.assemble_experts import assemble_experts
from te_export.rewrite.cancel_shapes import cancel_shapes
from te_export.rewrite.fuse_experts import fuse_experts
from te_export.rewrite.stack_linears import stack_linears


def assembled(nets: ModuleType) -> ir.Graph:
    net = nets.Net()
    cube, flat = nets.experts(net, net.x)
    return net.ends(cube=cube, flat=net.relu(flat))  # type: ignore[no-any-return]


def fused(nets: ModuleType, *, swapped: bool = False) -> ir.Graph:
    net = nets.Net()
    cube, flat = nets.experts(net, net.x)
    weights = net.add("Softmax", [net.linear(flat, 3, "gate")], ["batch", 3], "softmax", axis=-1)
    total = nets.fusion(net, weights, cube, "fusion")
    if swapped:
        (product,) = [node for node in net.graph if node.op_type == "Mul"]
        column, features = product.inputs
        product.replace_input_with(0, features)
        product.replace_input_with(1, column)
    return net.ends(w=weights, y=total)  # type: ignore[no-any-return]


def test_assembling_takes_a_concat_and_a_reshape(nets: ModuleType) -> None:
    graph = assembled(nets)

    found = assemble_experts(graph)

    counts = nets.operators(graph)
    assert (counts["Unsqueeze"], counts["Concat"], counts["Reshape"]) == (0, 1, 2)
    assert [entry.where for entry in found.applied] == ["stack"]
    nets.assert_same(assembled(nets), graph)
    nets.assert_settled(assemble_experts, graph)
    assert len(cancel_shapes(graph).applied) == 1  # the flat view is the Concat itself
    assert nets.operators(graph)["Reshape"] == 1
    nets.assert_same(assembled(nets), graph)
    nets.assert_settled(cancel_shapes, graph)


def test_pieces_of_one_split_need_no_concat(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net()
        rows = [net.linear(net.x, 4, f"e{i}") for i in range(3)]
        axis = net.integers("axis", [1])
        raised = [net.add("Unsqueeze", [row, axis], ["batch", 1, 4], f"u{i}") for i, row in enumerate(rows)]
        return net.ends(cube=net.add("Concat", raised, ["batch", 3, 4], "stack", axis=1))  # type: ignore[no-any-return]

    graph = build()
    stack_linears(graph, before_cut=True)
    assemble_experts(graph)

    assert nets.operators(graph) == {"Gemm": 1, "Reshape": 1}
    nets.assert_same(build(), graph)


@pytest.mark.parametrize(
    ("axis", "shape", "width", "reason"),
    [
        (2, ["batch", 1, 8], 4, "it does not give"),
        (1, ["batch", 2, 4], 5, "expected one shape (batch, features)"),
    ],
)
def test_what_is_no_row_for_each_expert_is_left(
    nets: ModuleType, axis: int, shape: list[int | str], width: int, reason: str
) -> None:
    net = nets.Net()
    rows = [net.linear(net.x, 4, "e0"), net.linear(net.x, width, "e1")]
    one = net.integers("axis", [1])
    raised = [
        net.add("Unsqueeze", [row, one], ["batch", 1, w], f"u{i}")
        for i, (row, w) in enumerate(zip(rows, (4, width), strict=True))
    ]
    graph = net.ends(cube=net.add("Concat", raised, shape, "stack", axis=axis))

    found = assemble_experts(graph)

    assert found.applied == ()
    assert found.declined[0].where == "stack"
    assert reason in found.declined[0].reason


@pytest.mark.parametrize("swapped", [False, True])
def test_a_fusion_is_one_matmul(nets: ModuleType, swapped: bool) -> None:
    graph = fused(nets, swapped=swapped)

    found = fuse_experts(graph)

    counts = nets.operators(graph)
    assert (counts["MatMul"], counts["Mul"], counts["ReduceSum"]) == (1, 0, 0)
    assert [entry.where for entry in found.applied] == ["fusion.mul"]
    nets.assert_same(fused(nets), graph)
    nets.assert_settled(fuse_experts, graph)


def keeps_the_axis(net: Any, product: ir.Node, total: ir.Node) -> None:
    total.attributes["keepdims"] = ir.AttrInt64("keepdims", 1)
    total.outputs[0].shape = ir.Shape(["batch", 1, 4])


def sums_over_features(net: Any, product: ir.Node, total: ir.Node) -> None:
    total.replace_input_with(1, net.integers("axis_2", [2]))
    total.outputs[0].shape = ir.Shape(["batch", 3])


def products_are_read(net: Any, product: ir.Node, total: ir.Node) -> None:
    net.graph.outputs.append(product.outputs[0])


def weights_are_for_rows(net: Any, product: ir.Node, total: ir.Node) -> None:
    axes = net.integers("axis_0", [0])
    raised = net.add("Unsqueeze", [net.constant("row", np.ones((1, 4))), axes], [1, 1, 4], "raised")
    product.replace_input_with(0, raised)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (keeps_the_axis, "without keeping the axis"),
        (sums_over_features, "not summed over axis 1 alone"),
        (products_are_read, "read by something else than their sum"),
        (weights_are_for_rows, "its factors are not weights (batch, experts, 1)"),
    ],
)
def test_what_is_no_fusion_is_left(nets: ModuleType, change: Any, reason: str) -> None:
    net = nets.Net()
    cube, flat = nets.experts(net, net.x)
    weights = net.linear(flat, 3, "gate")
    nets.fusion(net, weights, cube, "fusion")
    product, total = list(net.graph)[-2:]
    change(net, product, total)
    graph = net.ends(y=total.outputs[0])

    found = fuse_experts(graph)

    assert found.applied == ()
    assert [(entry.where, reason in entry.reason) for entry in found.declined] == [("fusion.mul", True)]


def test_an_output_keeps_the_node_that_names_it(nets: ModuleType) -> None:
    net = nets.Net()
    cube = net.add(
        "Reshape", [net.linear(net.x, 6, "e"), net.integers("a", [-1, 2, 3])], ["batch", 2, 3], "cube"
    )
    flat = net.add("Reshape", [cube, net.integers("b", [-1, 6])], ["batch", 6], "flat")
    graph = net.ends(y=flat)

    found = cancel_shapes(graph)

    assert found.applied == ()
    assert found.declined[0].where == "flat"
    assert "output of the graph" in found.declined[0].reason


def test_pieces_joined_again_are_the_whole(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net()
        layers = [net.linear(net.x, 4, f"e{i}") for i in range(3)]
        return net.ends(y=net.relu(net.add("Concat", layers, ["batch", 12], "join", axis=1)))  # type: ignore[no-any-return]

    graph = build()
    stack_linears(graph, before_cut=True)
    cancel_shapes(graph)

    assert nets.operators(graph) == {"Gemm": 1, "Relu": 1}
    nets.assert_same(build(), graph)
    nets.assert_settled(partial(stack_linears, before_cut=True), graph)

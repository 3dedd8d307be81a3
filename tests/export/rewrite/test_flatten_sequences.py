"""Layers over sequences and maps become layers over their positions, with the parameters as they are stored."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from te_export.rewrite.cancel_shapes import cancel_shapes
from te_export.rewrite.flatten_sequences import flatten_sequences
from te_export.rewrite.graph_cost import measure_cost
from te_export.rewrite.row_axis import elements_per_row, row_axis
from te_export.rewrite.stack_linears import stack_linears


def layer(
    net: Any,
    x: ir.Value,
    out: int,
    name: str,
    *,
    bias: bool = True,
    transposed: bool = True,
    left: bool = True,
) -> ir.Value:
    """An nn.Linear over more axes than two, as torch captures it: (…, D) to (…, out)."""
    *places, width = x.shape or ()
    values = net.rng.standard_normal((out, width) if transposed else (width, out))
    weight = net.constant(f"{name}.weight", values)
    if transposed:
        weight = net.add("Transpose", [weight], [width, out], f"{name}.turn", perm=[1, 0])
    y = net.add("MatMul", [x, weight], [*places, out], f"{name}.product")
    if not bias:
        return y
    terms = [y, net.constant(f"{name}.bias", net.rng.standard_normal(out))]
    return net.add("Add", terms if left else terms[::-1], [*places, out], f"{name}.sum")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("sizes", [(4,), (2, 3)])
def test_it_gives_the_same_from_one_gemm(
    nets: ModuleType, sizes: tuple[int, ...], transposed: bool, bias: bool
) -> None:
    def build() -> ir.Graph:
        width, out = (5, 7) if bias else (128, 128)  # a small layer without bias is left alone
        net = nets.Net(width=width * int(np.prod(sizes)))
        x = net.image(*sizes, width)
        return net.ends(y=net.relu(layer(net, x, out, "one", bias=bias, transposed=transposed)))

    graph = build()
    cost = measure_cost(graph)
    found = flatten_sequences(graph)

    assert nets.operators(graph) == {"Reshape": 3, "Gemm": 1, "Relu": 1}
    assert [entry.where for entry in found.applied] == ["one"]
    assert set(graph.initializers) >= {"one.weight"}
    after = measure_cost(graph)
    assert (after.multiply_adds, after.weight_bytes) == (cost.multiply_adds, cost.weight_bytes)
    (relu,) = (node for node in graph if node.op_type == "Relu")
    assert str(relu.outputs[0].shape) == f"[{int(np.prod(sizes))}*batch,{7 if bias else 128}]"
    nets.assert_same(build(), graph)
    nets.assert_settled(flatten_sequences, graph)


@pytest.mark.parametrize("left", [True, False])
def test_the_batch_may_stand_behind_the_places(nets: ModuleType, left: bool) -> None:
    def build() -> ir.Graph:
        net = nets.Net(width=12)
        turned = net.add("Transpose", [net.image(4, 3)], [4, "batch", 3], "turn", perm=[1, 0, 2])
        y = layer(net, turned, 2, "one", left=left)
        return net.ends(y=net.add("Transpose", [y], ["batch", 4, 2], "back", perm=[1, 0, 2]))

    graph = build()

    assert len(flatten_sequences(graph).applied) == 1
    assert nets.operators(graph)["Gemm"] == 1
    nets.assert_same(build(), graph)


def test_rows_need_no_new_layout(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net()
        return net.ends(y=layer(net, net.relu(layer(net, net.x, 4, "one")), 3, "two", bias=False))

    graph = build()

    assert len(flatten_sequences(graph).applied) == 2
    assert nets.operators(graph) == {"Gemm": 2, "Relu": 1}
    nets.assert_same(build(), graph)


def test_layers_that_read_the_same_value_are_stacked_then(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net(width=12)
        x = net.image(4, 3)
        parts = [layer(net, x, 2, name) for name in ("query", "key", "value")]
        return net.ends(y=net.add("Concat", parts, ["batch", 4, 6], "join", axis=-1))

    graph = build()
    flatten_sequences(graph)
    found = stack_linears(graph, before_cut=True)

    assert len(found.applied) == 1
    assert nets.operators(graph) == {"Reshape": 5, "Gemm": 1, "Split": 1, "Concat": 1}
    nets.assert_same(build(), graph)


def test_between_two_layers_nothing_is_laid_out_anew(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net(width=12)
        return net.ends(y=layer(net, net.relu(layer(net, net.image(4, 3), 5, "one")), 2, "two"))

    graph = build()
    flatten_sequences(graph)
    cancel_shapes(graph)

    assert [node.op_type for node in graph] == ["Reshape", "Reshape", "Gemm", "Relu", "Gemm", "Reshape"]
    nets.assert_same(build(), graph)


def test_what_is_added_and_is_no_bias_stays_an_addition(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net(width=12)
        x = net.image(4, 3)
        terms = [layer(net, x, 3, "one", bias=False), x]
        wide = net.constant("wide", net.rng.standard_normal((4, 3)))
        y = net.add("Add", [net.add("Add", terms, ["batch", 4, 3], "rest"), wide], ["batch", 4, 3], "moved")
        return net.ends(y=y)

    graph = build()
    flatten_sequences(graph)

    assert nets.operators(graph)["Add"] == 2
    nets.assert_same(build(), graph)


def test_an_output_keeps_its_name_and_what_else_is_read_stays(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net(width=512)
        product = layer(net, net.image(4, 128), 128, "one", bias=False)
        bias = net.constant("one.bias", net.rng.standard_normal(128))
        return net.ends(y=product, z=net.add("Add", [product, bias], ["batch", 4, 128], "sum"))

    graph = build()

    assert len(flatten_sequences(graph).applied) == 1
    assert [value.name for value in graph.outputs] == ["y", "z"]
    assert nets.operators(graph)["Add"] == 1
    nets.assert_same(build(), graph)


def test_what_is_no_layer_is_left_and_said_where_a_constant_is_read(nets: ModuleType) -> None:
    net = nets.Net(width=12)
    x = net.image(4, 3)
    unknown = net.add("Abs", [x], ["batch", 4, 3], "abs")
    unknown.shape = None
    weight = net.constant("one.weight", net.rng.standard_normal((3, 2)))
    product = net.add("MatMul", [unknown, weight], ["batch", 4, 2], "product")
    turned = net.add("Transpose", [x], ["batch", 3, 4], "turn", perm=[0, 2, 1])
    graph = net.ends(y=product, z=net.add("MatMul", [x, turned], ["batch", 4, 4], "attention"))

    found = flatten_sequences(graph)

    assert found.applied == ()
    assert [(entry.where, "not known" in entry.reason) for entry in found.declined] == [("product", True)]


def test_a_small_layer_without_bias_is_left(nets: ModuleType) -> None:
    net = nets.Net(width=12)
    graph = net.ends(y=layer(net, net.image(4, 3), 2, "one", bias=False))

    found = flatten_sequences(graph)

    assert found.applied == ()
    assert "small and has no bias" in found.declined[0].reason


def test_a_transpose_that_changes_nothing_is_no_transposed_weight(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net(width=3)
        weight = net.constant("one.weight", net.rng.standard_normal((3, 3)))
        same = net.add("Transpose", [weight], [3, 3], "same", perm=[0, 1])
        return net.ends(y=net.add("MatMul", [net.x, same], ["batch", 3], "product"))

    graph = build()

    assert flatten_sequences(graph).applied == ()
    nets.assert_same(build(), graph)


@pytest.mark.parametrize(
    ("places", "axis", "count"),
    [
        (("batch",), "batch", 1),
        (("batch", 20), "20*batch", 20),
        ((20, "batch"), "20*batch", 20),
        (("batch", 4, 5), "20*batch", 20),
        (("4*batch", 5), "20*batch", 20),
        (("rows", 2), "2*rows", 2),
    ],
)
def test_the_axis_of_rows_tells_how_many_each_row_of_the_batch_has(
    places: tuple[int | str, ...], axis: str, count: int
) -> None:
    assert row_axis(places) == axis
    assert elements_per_row(axis) == count
    assert elements_per_row(7) == 7

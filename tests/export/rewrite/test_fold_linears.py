"""Linear after linear becomes one linear layer, where that is cheaper and exact."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from te_export.rewrite.fold_linears import fold_linears
from te_export.rewrite.graph_cost import measure_cost

Build = Callable[[Any], ir.Graph]


def two_readers(net: Any) -> ir.Graph:
    """6 → 8 → two layers of 5 and 3: 48 + 64 multiply-adds apart, 48 folded."""
    h = net.linear(net.x, 8, "first")
    return net.ends(y=net.linear(h, 5, "one"), z=net.relu(net.linear(h, 3, "two")))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_it_gives_the_same_in_fewer_multiply_adds(
    nets: ModuleType, turned: bool, biases: tuple[bool, bool]
) -> None:
    def build() -> ir.Graph:
        net = nets.Net()
        h = net.linear(net.x, 8, "first", bias=biases[0], turned=turned)
        return net.ends(y=net.linear(h, 5, "one", bias=biases[1], turned=turned), z=net.linear(h, 3, "two"))

    graph = build()
    found = fold_linears(graph)

    assert nets.operators(graph) == {"Gemm": 2}
    assert measure_cost(graph).multiply_adds == 6 * 8
    assert [entry.where for entry in found.applied] == ["first"]
    assert found.declined == ()
    nets.assert_same(build(), graph, tolerance=nets.FOLDED)
    nets.assert_settled(fold_linears, graph)


def test_the_product_is_rounded_once(nets: ModuleType) -> None:
    before, graph = two_readers(nets.Net()), two_readers(nets.Net())
    fold_linears(graph)

    def of(name: str) -> np.ndarray:
        return before.initializers[name].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]

    exact = of("one.weight") @ of("first.weight")
    shift = of("one.weight") @ of("first.bias") + of("one.bias")
    folded = graph.initializers["one.weight.folded"].const_value
    bias = graph.initializers["one.bias.folded"].const_value
    assert folded is not None
    assert bias is not None
    np.testing.assert_array_equal(folded.numpy(), exact.astype(np.float32))
    np.testing.assert_array_equal(bias.numpy(), shift.astype(np.float32))


def test_it_says_whose_place_each_new_weight_took(nets: ModuleType) -> None:
    found = fold_linears(two_readers(nets.Net()))

    assert set(found.sources["one.weight.folded"]) == {"one.weight", "first.weight"}
    assert set(found.sources["one.bias.folded"]) == {"one.bias", "first.bias"}


def leaves_the_graph(net: Any) -> ir.Graph:
    h = net.linear(net.x, 8, "first")
    return net.ends(h=h, y=net.linear(h, 5, "one"))


def is_read_elsewhere(net: Any) -> ir.Graph:
    h = net.linear(net.x, 8, "first")
    return net.ends(y=net.linear(h, 5, "one"), z=net.relu(h))


def costs_more(net: Any) -> ir.Graph:
    h = net.linear(net.x, 2, "first")
    return net.ends(y=net.linear(h, 50, "one"))


def has_alpha(net: Any) -> ir.Graph:
    h = net.linear(net.x, 8, "first", alpha=0.5)
    return net.ends(y=net.linear(h, 5, "one"))


def reader_has_beta(net: Any) -> ir.Graph:
    h = net.linear(net.x, 8, "first")
    return net.ends(y=net.linear(h, 5, "one", beta=2.0))


def weight_is_computed(net: Any) -> ir.Graph:
    weight = net.add("Neg", [net.constant("w", np.ones((8, 6)))], [8, 6], "computed")
    h = net.add("Gemm", [net.x, weight], ["batch", 8], "first", transB=1)
    return net.ends(y=net.linear(h, 5, "one"))


def overflows(net: Any) -> ir.Graph:
    h = net.linear(net.x, 8, "first", scale=1e30)
    return net.ends(y=net.linear(h, 5, "one", scale=1e30))


def bias_is_a_matrix(net: Any) -> ir.Graph:
    weight, bias = net.constant("w", np.ones((8, 6))), net.constant("b", np.ones((1, 8)))
    h = net.add("Gemm", [net.x, weight, bias], ["batch", 8], "first", transB=1)
    return net.ends(y=net.linear(h, 5, "one"))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (leaves_the_graph, "its output h leaves the graph"),
        (is_read_elsewhere, "its output is also read by relu_2: it is a Relu"),
        (costs_more, "it would take 300 multiply-adds instead of 112"),
        (has_alpha, "alpha or beta is not 1"),
        (reader_has_beta, "read by one: its alpha or beta is not 1"),
        (weight_is_computed, "its weight is not a float32 constant"),
        (overflows, "passes the largest float32"),
        (bias_is_a_matrix, "its bias is not a float32 constant"),
    ],
)
def test_it_declines_by_name_and_changes_nothing(nets: ModuleType, build: Build, reason: str) -> None:
    graph = build(nets.Net())
    before = nets.operators(graph)

    found = fold_linears(graph)

    assert found.applied == ()
    assert [entry.where for entry in found.declined] == ["first"]
    assert reason in found.declined[0].reason
    assert nets.operators(graph) == before


def test_an_activation_between_is_no_match(nets: ModuleType) -> None:
    net = nets.Net()
    graph = net.ends(y=net.linear(net.relu(net.linear(net.x, 8, "first")), 5, "one"))

    assert fold_linears(graph) == fold_linears(nets.Net().ends())

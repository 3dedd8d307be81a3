"""Equal layers on the pieces of one value become one batched MatMul, from either side."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import onnx_ir as ir
import pytest

from te_export.rewrite.batch_linears import batch_linears
from te_export.rewrite.batching_policy import worth_batching
from te_export.rewrite.stack import stack_of

on_cuda = partial(batch_linears, provider="cuda", before_cut=False)
on_cuda_before_cut = partial(batch_linears, provider="cuda", before_cut=True)


def pieces(net: Any, count: int = 3, width: int = 4) -> list[ir.Value]:
    whole = net.relu(net.linear(net.x, count * width, "whole"))
    sizes = net.integers("sizes", [width] * count)
    return net.add_many("Split", [whole, sizes], [["batch", width]] * count, "split", axis=1)  # type: ignore[no-any-return]


def chains(
    net: Any, *, layers: int = 1, turned: bool = False, last_relu: bool = False, count: int = 3
) -> ir.Graph:
    ends = pieces(net, count)
    for layer in range(layers):
        ends = [net.linear(end, 5 + layer, f"c{i}.{layer}", turned=turned) for i, end in enumerate(ends)]
        if layer + 1 < layers or last_relu:
            ends = [net.relu(end) for end in ends]
    return net.ends(y=net.add("Concat", ends, ["batch", count * (4 + layers)], "join", axis=1))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("last_relu", [False, True])
@pytest.mark.parametrize("rule", [on_cuda, on_cuda_before_cut])
@pytest.mark.parametrize("layers", [1, 2])
def test_it_gives_the_same_from_one_matmul_a_layer(
    nets: ModuleType, turned: bool, last_relu: bool, rule: Any, layers: int
) -> None:
    graph = chains(nets.Net(), layers=layers, turned=turned, last_relu=last_relu)

    while rule(graph).applied:
        pass

    found = nets.operators(graph)
    assert (found["Gemm"], found["MatMul"], found["Split"]) == (1, layers, 1)
    nets.assert_same(chains(nets.Net(), layers=layers, turned=turned, last_relu=last_relu), graph)
    nets.assert_settled(rule, graph)


@pytest.mark.parametrize(("turned", "shape"), [(False, [3, 5, 4]), (True, [3, 4, 5])])
def test_after_the_cut_the_weights_are_the_bytes_of_the_parts(
    nets: ModuleType, turned: bool, shape: list[int]
) -> None:
    graph = chains(nets.Net(), turned=turned)
    parts = b"".join(graph.initializers[f"c{i}.0.weight"].const_value.tobytes() for i in range(3))  # type: ignore[union-attr]

    on_cuda(graph)

    tensor = graph.initializers["c0.0.weight+2"].const_value
    assert tensor is not None
    assert stack_of(tensor) is not None
    assert list(tensor.shape.numpy()) == shape
    assert tensor.tobytes() == parts


def test_a_second_layer_goes_on_where_the_first_ended(nets: ModuleType) -> None:
    graph = chains(nets.Net(), layers=2)

    while on_cuda_before_cut(graph).applied:
        pass

    assert nets.operators(graph)["Transpose"] == 2  # into (T, B, D) once and back once


def uneven(net: Any) -> ir.Graph:
    whole = net.linear(net.x, 6, "whole")
    one, two = net.add_many(
        "Split", [whole, net.integers("sizes", [2, 4])], [["batch", 2], ["batch", 4]], "split", axis=1
    )
    return net.ends(
        y=net.add("Sum", [net.linear(one, 3, "c0"), net.linear(two, 3, "c1")], ["batch", 3], "sum")
    )  # type: ignore[no-any-return]


def other_widths(net: Any) -> ir.Graph:
    ends = [net.linear(piece, 2 + i, f"c{i}") for i, piece in enumerate(pieces(net))]
    return net.ends(y=net.add("Concat", ends, ["batch", 9], "join", axis=1))  # type: ignore[no-any-return]


def no_bias(net: Any) -> ir.Graph:
    ends = [net.linear(piece, 2, f"c{i}", bias=i > 0) for i, piece in enumerate(pieces(net))]
    return net.ends(y=net.add("Concat", ends, ["batch", 6], "join", axis=1))  # type: ignore[no-any-return]


def scaled(net: Any) -> ir.Graph:
    ends = [net.linear(piece, 2, f"c{i}", alpha=1.0 + i) for i, piece in enumerate(pieces(net))]
    return net.ends(y=net.add("Concat", ends, ["batch", 6], "join", axis=1))  # type: ignore[no-any-return]


def other_tasks(net: Any) -> ir.Graph:
    return net.ends(**{f"y{i}": net.linear(piece, 2, f"c{i}") for i, piece in enumerate(pieces(net))})  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (uneven, "pieces of different widths"),
        (other_widths, "their outputs are 2, 3, 4 wide"),
        (no_bias, "c0 has no bias"),
        (scaled, "alpha or beta is not 1"),
        (other_tasks, "serve different tasks"),
    ],
)
def test_it_declines_by_name_and_changes_nothing(nets: ModuleType, build: Any, reason: str) -> None:
    graph = build(nets.Net())
    before = nets.operators(graph)

    found = on_cuda_before_cut(graph)

    assert found.applied == ()
    assert [entry.where for entry in found.declined] == ["c0"]
    assert reason in found.declined[0].reason
    assert nets.operators(graph) == before


def test_layers_that_are_faster_apart_stay_apart(nets: ModuleType) -> None:
    net = nets.Net(width=64)
    ends = [net.linear(piece, 40, f"c{i}") for i, piece in enumerate(pieces(net, width=60))]
    graph = net.ends(y=net.add("Sum", ends, ["batch", 40], "sum"))

    found = batch_linears(graph, provider="cpu", before_cut=False)

    assert found.applied == ()
    assert found.declined[0].reason == "3 layers of 2,400 weights are faster apart on cpu"


def test_what_is_worth_batching() -> None:
    """The layers of the reference model: second gate layers, first head layers, experts."""
    assert worth_batching(5, 1_024, "cpu")
    assert not worth_batching(1, 1_024, "cpu")
    assert not worth_batching(5, 8_192, "cpu")
    assert worth_batching(20, 8_192, "cpu")
    assert not worth_batching(8, 32_768, "cpu")
    assert not worth_batching(100, 32_768, "cpu")
    assert worth_batching(8, 32_768, "cuda")
    assert not worth_batching(1, 32_768, "cuda")

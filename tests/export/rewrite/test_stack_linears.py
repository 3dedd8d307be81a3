"""Linear layers that read the same value become one and a Split, sharing the bytes of their weights."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from te_export.bundle.weights_file import plan_weights, weight_chunks
from te_export.rewrite.stack import stack_of
from te_export.rewrite.stack_linears import stack_linears

before_cut = partial(stack_linears, before_cut=True)
after_cut = partial(stack_linears, before_cut=False)


def readers(net: Any, *, activation: bool = True, widths: tuple[int, ...] = (4, 4, 4)) -> ir.Graph:
    """Layers that read x and all serve the one output."""
    layers = [net.linear(net.x, width, f"layer.{index}") for index, width in enumerate(widths)]
    ends = [net.relu(layer) for layer in layers] if activation else layers
    return net.ends(y=net.add("Concat", ends, ["batch", sum(widths)], "join", axis=1))


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("widths", [(4, 4, 4), (5, 1, 3)])
def test_it_gives_the_same_from_one_gemm(nets: ModuleType, activation: bool, widths: tuple[int, ...]) -> None:
    graph = readers(nets.Net(), activation=activation, widths=widths)

    found = before_cut(graph)

    assert nets.operators(graph) == {"Gemm": 1, "Split": 1, "Concat": 1} | ({"Relu": 1} if activation else {})
    assert len(found.applied) == 1
    nets.assert_same(readers(nets.Net(), activation=activation, widths=widths), graph)
    nets.assert_settled(before_cut, graph)


def test_parts_are_ranges_of_the_bytes_of_the_stack(nets: ModuleType) -> None:
    net = nets.Net(width=40)
    graph = readers(net, widths=(30, 50))
    weights = {name: value.const_value.numpy() for name, value in graph.initializers.items()}
    before_cut(graph)

    layout = plan_weights([graph])
    data = b"".join(bytes(chunk) for chunk in weight_chunks(layout))

    stack = stack_of(graph.initializers["layer.0.weight+1"].const_value)
    assert stack is not None
    assert [part.name for part in stack.parts] == ["layer.0.weight", "layer.1.weight"]
    for name in ("layer.0.weight", "layer.1.weight"):
        offset, length = layout.places[name]
        assert data[offset : offset + length] == weights[name].tobytes()
    first, second = (layout.places[f"layer.{index}.weight"] for index in range(2))
    assert first[0] == layout.places["layer.0.weight+1"][0]
    assert second[0] == first[0] + first[1]


def test_layers_of_different_outputs_wait_for_the_joint_graph(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net()
        return net.ends(y=net.linear(net.x, 3, "one"), z=net.linear(net.x, 3, "two"))

    graph = build()
    found = before_cut(graph)

    assert found.applied == ()
    assert [(entry.where, "serve different tasks" in entry.reason) for entry in found.declined] == [
        ("one", True)
    ]
    assert len(after_cut(graph).applied) == 1
    nets.assert_same(build(), graph)


def test_layers_with_different_activations_stay_apart(nets: ModuleType) -> None:
    net = nets.Net()
    one, two = (net.linear(net.x, 3, name) for name in ("one", "two"))
    ends = [net.relu(one), net.add("Tanh", [two], ["batch", 3], "tanh")]
    graph = net.ends(y=net.add("Sum", ends, ["batch", 3], "sum"))

    found = after_cut(graph)

    assert found.applied == ()
    assert "different activations" in found.declined[0].reason
    assert found.declined[0].where == "one"


def large_and_small(nets: ModuleType) -> ir.Graph:
    """Layers of 16,384 and of fewer weights that read x, as an MMoE's experts and gates do."""
    net = nets.Net(width=128)
    layers = [net.linear(net.x, width, f"layer.{index}") for index, width in enumerate((128, 8, 128, 8))]
    return net.ends(
        y=net.add("Concat", [net.relu(layer) for layer in layers], ["batch", 272], "join", axis=1)
    )


def test_what_a_lower_precision_converts_is_stacked_apart(nets: ModuleType) -> None:
    graph = large_and_small(nets)

    found = after_cut(graph)

    assert [entry.where for entry in found.applied] == ["layer.0", "layer.1"]
    stacks = [stack for value in graph.initializers.values() if (stack := stack_of(value.const_value))]
    named = sorted([part.name for part in stack.parts] for stack in stacks)
    assert named == [
        [f"layer.{i}.{what}" for i in pair] for pair in ((0, 2), (1, 3)) for what in ("bias", "weight")
    ]
    nets.assert_same(large_and_small(nets), graph)
    nets.assert_settled(after_cut, graph)


def test_a_layer_that_is_alone_for_its_size_is_named(nets: ModuleType) -> None:
    net = nets.Net(width=128)
    graph = net.ends(y=net.linear(net.x, 128, "large"), z=net.linear(net.x, 8, "small"))

    found = after_cut(graph)

    assert found.applied == ()
    assert [
        (entry.where, "a lower precision holds otherwise" in entry.reason) for entry in found.declined
    ] == [("large", True)]


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        ({"turned": True}, "stored (in, out)"),
        ({"bias": False}, "it has no bias"),
        ({"alpha": 2.0}, "alpha or beta is not 1"),
    ],
)
def test_a_layer_that_cannot_be_stacked_is_named(nets: ModuleType, kept: dict[str, Any], reason: str) -> None:
    net = nets.Net()
    layers = [net.linear(net.x, 3, "one", **kept), net.linear(net.x, 3, "two"), net.linear(net.x, 3, "three")]
    graph = net.ends(y=net.add("Sum", layers, ["batch", 3], "sum"))
    untouched = {name: value.const_value.numpy().copy() for name, value in graph.initializers.items()}

    found = before_cut(graph)

    assert [entry.where for entry in found.declined] == ["one"]
    assert reason in found.declined[0].reason
    assert [entry.where for entry in found.applied] == ["two"]
    np.testing.assert_array_equal(
        graph.initializers["one.weight"].const_value.numpy(), untouched["one.weight"]
    )  # type: ignore[union-attr]


def test_a_layer_that_is_an_output_keeps_its_name(nets: ModuleType) -> None:
    def build() -> ir.Graph:
        net = nets.Net()
        return net.ends(y=net.linear(net.x, 3, "one"), z=net.linear(net.x, 3, "two"))

    graph = build()
    after_cut(graph)

    assert [value.name for value in graph.outputs] == ["y", "z"]
    nets.assert_same(build(), graph)


def numbered(*gaps_before: int, count: int = 5) -> dict[str, int]:
    """Places of the weights of `readers`, one after another, with a gap before some."""
    places, place = {}, 0
    for index in range(count):
        place += 1 + (index in gaps_before)
        places[f"layer.{index}.weight"] = place
    return places


@pytest.mark.parametrize(
    ("laid_out", "stacks"),
    [
        (numbered(), ["layer.0.weight+4"]),
        (numbered(2), ["layer.0.weight+1", "layer.2.weight+2"]),
        (numbered(1, 4), ["layer.1.weight+2"]),
        (numbered(1, 2, 3, 4), []),
        ({}, ["layer.0.weight+4"]),
        ({"layer.0.weight": 3, "layer.1.weight": 4}, ["layer.0.weight+1", "layer.2.weight+2"]),
        ({f"layer.{index}.weight": 9 - index for index in range(5)}, []),
    ],
)
def test_only_neighbours_of_what_is_laid_out_are_stacked(
    nets: ModuleType, laid_out: dict[str, int], stacks: list[str]
) -> None:
    rule = partial(stack_linears, before_cut=True, laid_out=laid_out)
    graph = readers(nets.Net(), widths=(4,) * 5)
    rule(graph)
    found = [name for name, value in graph.initializers.items() if stack_of(value.const_value)]
    assert [name for name in found if "weight" in name] == stacks
    nets.assert_same(readers(nets.Net(), widths=(4,) * 5), graph)
    nets.assert_settled(rule, graph)


def test_layers_that_read_what_a_stack_replaces_are_stacked_after_it(nets: ModuleType) -> None:
    """Both groups are found in one round; the second reads the activation that the first takes away."""

    def chain() -> ir.Graph:
        net = nets.Net()
        first, other = (net.relu(net.linear(net.x, 4, f"first.{index}")) for index in range(2))
        second = [net.linear(first, 4, f"second.{index}") for index in range(2)]
        return net.ends(y=net.add("Concat", [other, *second], ["batch", 12], "join", axis=1))

    graph = chain()

    found = before_cut(graph)

    assert len(found.applied) == 2
    assert nets.operators(graph)["Gemm"] == 2
    nets.assert_same(chain(), graph)

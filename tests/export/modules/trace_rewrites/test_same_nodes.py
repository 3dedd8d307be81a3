"""Equal operators of equal arguments become one node; anything that differs stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from te_export.modules.trace import Traced
from te_export.modules.trace_rewrites.same_nodes import merge_same_nodes

aten = torch.ops.aten


def graph_of(*made: Callable[[Graph, Node], Any]) -> Graph:
    """A graph of one input x whose outputs are what each function makes of it."""
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(tuple(make(graph, x) for make in made))
    return graph


def call(target: Any, *args: object, **kwargs: object) -> Callable[[Graph, Node], Node]:
    return lambda graph, x: graph.call_function(target, (x, *args), kwargs)


def operators(graph: Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "make",
    [
        call(aten.relu.default),
        call(aten.sum.dim_IntList, [1], True),
        call(aten.add.Tensor, 1.0, alpha=2),
        call(aten._to_copy.default, dtype=torch.float64),
        call(aten.mul.Tensor, 0.1),
    ],
)
def test_the_same_operator_twice_is_one(make: Callable[[Graph, Node], Any]) -> None:
    graph = graph_of(make, make, make)

    assert merge_same_nodes(graph) == 2
    assert len(operators(graph)) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (call(aten.relu.default), call(aten.tanh.default)),
        (call(aten.add.Tensor, 1), call(aten.add.Tensor, 1.0)),
        (call(aten.add.Tensor, 1), call(aten.add.Tensor, True)),
        (call(aten.add.Tensor, 0.0), call(aten.add.Tensor, -0.0)),
        (call(aten.add.Tensor, 1.0), call(aten.add.Tensor, 1.0, alpha=2)),
        (call(aten.sum.dim_IntList, [1]), call(aten.sum.dim_IntList, [-1])),
        (call(aten._to_copy.default, dtype=torch.float64), call(aten._to_copy.default, dtype=torch.float32)),
        (call(aten.softmax.int, 1), call(aten.softmax.int, 1, torch.float32)),
    ],
)
def test_what_differs_in_anything_stays(
    one: Callable[[Graph, Node], Any], other: Callable[[Graph, Node], Any]
) -> None:
    graph = graph_of(one, other)

    assert merge_same_nodes(graph) == 0
    assert len(operators(graph)) == 2


def test_order_of_arguments_counts() -> None:
    def apart(graph: Graph, x: Node) -> tuple[Node, Node]:
        half = graph.call_function(aten.mul.Tensor, (x, 0.5))
        return (
            graph.call_function(aten.sub.Tensor, (x, half)),
            graph.call_function(aten.sub.Tensor, (half, x)),
        )

    assert merge_same_nodes(graph_of(apart)) == 0


def test_order_of_named_arguments_does_not_count() -> None:
    one = call(aten.clamp.default, min=0.0, max=1.0)
    other = call(aten.clamp.default, max=1.0, min=0.0)

    assert merge_same_nodes(graph_of(one, other)) == 1


def test_what_follows_merged_nodes_is_merged_too() -> None:
    def chain(graph: Graph, x: Node) -> Node:
        h = graph.call_function(aten.relu.default, (x,))
        return graph.call_function(aten.cat.default, ([h, x], 1))

    graph = graph_of(chain, chain)

    assert merge_same_nodes(graph) == 2
    assert operators(graph) == ["aten.relu.default", "aten.cat.default"]


def test_the_numbers_are_the_same() -> None:
    graph = graph_of(call(aten.relu.default), call(aten.relu.default), call(aten.mul.Tensor, 2))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    before = GraphModule(nn.Module(), graph)(x)

    merge_same_nodes(graph)
    graph.lint()

    for one, other in zip(GraphModule(nn.Module(), graph)(x), before, strict=True):
        assert torch.equal(one, other)


class AskedByTask(nn.Module):
    num_tasks = 3

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))

    def forward(self, x: Tensor, task: int) -> Tensor:
        found: Tensor = self.heads[task](torch.relu(self.trunk(x)))
        return found


def test_a_module_asked_task_by_task_computes_its_trunk_once(
    trace_module: Callable[..., Traced],
) -> None:
    traced = trace_module(AskedByTask(), torch.zeros(2, 4))

    merged = merge_same_nodes(traced.graph)

    assert merged == 4
    assert sorted(operators(traced.graph)) == ["aten.linear.default"] * 4 + ["aten.relu.default"]
    assert merge_same_nodes(traced.graph) == 0

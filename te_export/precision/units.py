"""What is kept or converted together: the layers of one joint graph at the same depth, of the same shape, that reach
the same tasks, such as the second layers of all experts; and embedding tables of the same width that do.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from te_export.precision.embedding_tables import embedding_tables
from te_export.precision.layers import linear_layers, weight_names
from te_export.precision.static.convolutions import convolutions

__all__ = ["layer_units"]


def layer_units(graph: ir.Graph) -> list[frozenset[str]]:
    """The weights of each unit, in the order of the graph."""
    depths = _depths(graph)
    reached = _tasks_reached(graph)
    units: dict[tuple[object, ...], set[str]] = {}
    for conv in convolutions(graph):
        shape = tuple(conv.weight.shape or ())
        units.setdefault(("convolution", depths[conv.node], shape, reached[conv.node]), set()).add(conv.name)
    for table in embedding_tables(graph):
        units.setdefault(("table", table.width, reached[table.node]), set()).add(table.name)
    for linear in linear_layers(graph):
        key = (depths[linear.node], linear.width_in, linear.width_out, reached[linear.node])
        units.setdefault(key, set()).update(weight_names(linear))
    return _disjoint(units.values())


def _disjoint(units: Iterable[set[str]]) -> list[frozenset[str]]:
    """Units that share a weight as one, in the order in which they begin: a layer may be used at several depths."""
    found: list[set[str]] = []
    for unit in units:
        sharing = [other for other in found if not unit.isdisjoint(other)]
        if not sharing:
            found.append(set(unit))
            continue
        first, *others = sharing
        first.update(unit, *others)
        found = [other for other in found if not any(other is gone for gone in others)]
    return [frozenset(unit) for unit in found]


def _depths(graph: ir.Graph) -> dict[ir.Node, int]:
    """For each node, the most layers on a way from an input to it."""
    depths: dict[ir.Node, int] = {}
    for node in graph:
        producers = (value.producer() for value in node.inputs if value is not None)
        before = max((depths[producer] for producer in producers if producer is not None), default=0)
        depths[node] = before + (node.op_type in ("Gemm", "MatMul", "Conv"))
    return depths


def _tasks_reached(graph: ir.Graph) -> dict[ir.Node, frozenset[str]]:
    """For each node, the graph's outputs that depend on it."""
    reached: dict[ir.Node, frozenset[str]] = {}
    for node in reversed(graph):
        found: set[str] = set()
        for value in node.outputs:
            if value.is_graph_output():
                found.add(str(value.name))
            for user, _ in value.uses():
                found |= reached[user]
        reached[node] = frozenset(found)
    return reached

"""What a task graph no longer depends on once some of its experts are gone, told from the graph as captured."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from te_export.pruning.mixture import find_mixtures
from te_export.rewrite.edit import axes_of
from te_export.verify.dependencies import dependencies_of

__all__ = ["freed_by", "parameters_without"]


def freed_by(captured: ir.Model, sources: Mapping[str, tuple[str, ...]]) -> list[list[frozenset[str]]]:
    """For each mixture and each of its experts, the parameters that nothing reads once that expert alone is gone.

    Args:
        captured: a task graph before any rewrite.
        sources: as in JointGraph.
    """
    found = []
    for place, mixture in enumerate(find_mixtures(captured.graph)):
        whole = _all(parameters_without(captured, place, (), sources))
        rest = [parameters_without(captured, place, (expert,), sources) for expert in range(mixture.count)]
        found.append([whole - _all(left) for left in rest])
    return found


def parameters_without(
    captured: ir.Model, place: int, removed: Collection[int], sources: Mapping[str, tuple[str, ...]]
) -> dict[str, frozenset[str]]:
    """The parameters that each output depends on while some experts are numbers from nowhere.

    Args:
        captured, sources: as for freed_by.
        place: which of its mixtures.
        removed: those experts.
    """
    model = captured.clone()
    mixture = find_mixtures(model.graph)[place]
    for expert in removed:
        node, place_of_row = mixture.joined[expert]
        node.replace_input_with(place_of_row, _nowhere(mixture.rows[expert]))
    return {
        str(value.name): frozenset(dependencies_of(value).parameters(sources))
        for value in model.graph.outputs
    }


def _nowhere(value: ir.Value) -> ir.Value:
    return ir.Value(name=f"{value.name}.gone", type=value.type, shape=ir.Shape(axes_of(value) or ()))


def _all(by_output: Mapping[str, frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*by_output.values())

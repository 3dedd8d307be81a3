"""Nothing lost and nothing added in the graphs of a traced module: what each output depends on, proved from the graph.

Every parameter that torch's own program has an output depend on reaches it in the captured graph; and in every graph
that is written, each output depends on exactly what it depended on when captured, and reads no input that it did not.
Routing weights that are a softmax when captured are one in each of them, laid out as (batch, K), or what it gave where it
reads constants alone; and where the prediction
was made with them when captured, it is in the joint graph and the task graphs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from te_export.capture.joint_graph import JointGraph
from te_export.errors import StructureError
from te_export.models.exportable import ExportableModel
from te_export.partition import PREDICTION, ROUTING_WEIGHTS, GraphSet, cut_task
from te_export.pruning.freed_parameters import parameters_without
from te_export.verify.dependencies import Dependencies, dependencies_of

__all__ = ["check_pruned_reachability", "check_reachability"]

_SHOWN = 8
_LAYOUTS = {"Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand", "Identity", "Split", "Flatten"}


def check_reachability(graphs: GraphSet, model: ExportableModel, captured: JointGraph) -> None:
    """Prove that every output of every graph depends on what it should.

    Args:
        graphs: as they will be written.
        captured: the joint graph before any rewrite.

    Raises:
        StructureError: naming the graph, the output, and what is missing or too many.
    """
    known = frozenset(model.parameter_sizes)
    expected: dict[str, frozenset[str]] = {}
    softmaxes: set[str] = set()
    used: set[str] = set()
    whole = [model.graph for model in (graphs.joint, *graphs.tasks.values())]
    for value in captured.model.graph.outputs:
        name = str(value.name)
        if _operator(_behind_layouts(value)) == "Softmax":
            softmaxes.add(name)
        if name.endswith(ROUTING_WEIGHTS) and _is_used(captured.model.graph, value):
            used.add(name)
        found = frozenset(dependencies_of(value).parameters(captured.sources))
        _compare("joint as captured", name, found=found & known, expected=_of(model, name), known=known)
        expected[name] = found & known
    for graph, task, value in _outputs(graphs):
        name = f"{task}.{value.name}" if task else str(value.name)
        above = dependencies_of(value)
        found = _reached(above, graphs) | _through_trunk(above, graphs)
        _compare(str(graph.name), name, found=found & known, expected=expected[name], known=known)
        made = _behind_layouts(value)
        if name in softmaxes and not made.is_initializer() and _operator(made) != "Softmax":
            raise StructureError(
                f"{graph.name}: {value.name} is made by {_operator(made)}, expected a Softmax"
            )
        if name in used and graph in whole and not _is_used(graph, value):
            raise StructureError(
                f"{graph.name}: {value.name} are not the weights that the prediction was made with"
            )


def check_pruned_reachability(
    pruned: JointGraph, place: int, removed: Collection[int], model: ExportableModel, captured: JointGraph
) -> None:
    """Prove that a graph without some experts depends on everything but them, and gives the weights that it mixes by.

    Args:
        pruned: the graph of one task, as it will be written.
        place: which of the mixtures of the task's graph as captured they were in.
        removed: the experts that are gone.
        captured: the joint graph before any rewrite.

    Raises:
        StructureError: naming what is missing, or was to be gone.
    """
    (task,) = pruned.tasks
    expected = parameters_without(cut_task(captured, task), place, removed, captured.sources)
    known = frozenset(model.parameter_sizes)
    graph = pruned.model.graph
    for value in graph.outputs:
        found = frozenset(dependencies_of(value).parameters(pruned.sources))
        _compare(
            str(graph.name),
            str(value.name),
            found=found & known,
            expected=expected[str(value.name)] & known,
            known=known,
        )
        if value.name == ROUTING_WEIGHTS and not _is_used(graph, value):
            raise StructureError(
                f"{graph.name}: {value.name} are not the weights that the prediction was made with"
            )


def _outputs(graphs: GraphSet) -> Iterator[tuple[ir.Graph, str, ir.Value]]:
    """Every output of a task: its graph, the task where the output's name lacks it, and the output."""
    for joined in graphs.joined:
        for value in joined.graph.outputs:
            yield joined.graph, "", value
    for models in (graphs.tasks, graphs.tails):
        for task, model in models.items():
            for value in model.graph.outputs:
                yield model.graph, task, value


def _of(model: ExportableModel, output: str) -> frozenset[str]:
    """The checkpoint's parameters that the traced program has an output depend on."""
    return frozenset(source for name in model.needed[output] for source in model.sources.get(name, (name,)))


def _reached(found: Dependencies, graphs: GraphSet) -> frozenset[str]:
    return frozenset(found.parameters(graphs.sources))


def _through_trunk(above: Dependencies, graphs: GraphSet) -> frozenset[str]:
    """What those values depend on in the trunk that a tail reads from there."""
    if graphs.trunk is None:
        return frozenset()
    made = {value.name: value for value in graphs.trunk.graph.outputs}
    return frozenset().union(
        *(
            _reached(dependencies_of(made[value.name], region), graphs)
            for value, regions in above.needed.items()
            if value.is_graph_input() and value.name in made
            for region in regions
        )
    )


def _compare(
    graph: str, output: str, *, found: frozenset[str], expected: frozenset[str], known: frozenset[str]
) -> None:
    for what, names in (
        ("do not reach", sorted(expected - found)),
        ("reach, and did not when captured,", sorted((found & known) - expected)),
    ):
        if names:
            raise StructureError(
                f"{graph}: {len(names)} parameters {what} {output}: {', '.join(names[:_SHOWN])}"
                f"{', …' if len(names) > _SHOWN else ''}. The graph would not be the module; nothing was written. Try "
                "--optimize none, and report this with the versions in use."
            )


def _is_used(graph: ir.Graph, weights: ir.Value) -> bool:
    """Whether routing weights are what the prediction beside them was made with."""
    prediction = str(weights.name).removesuffix(ROUTING_WEIGHTS) + PREDICTION
    (answer,) = (output for output in graph.outputs if output.name == prediction)
    return _behind_layouts(weights) in dependencies_of(answer).needed


def _behind_layouts(value: ir.Value) -> ir.Value:
    """What a value is, but for how it is laid out, or a piece of."""
    node = value.producer()
    while node is not None and node.op_type in _LAYOUTS and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _operator(value: ir.Value) -> str:
    node = value.producer()
    return "an input" if node is None else node.op_type

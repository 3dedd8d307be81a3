"""Gate and fusion intact: what must be in every graph that is written, proved from the graph itself.

For each task of a graph: every parameter of backbone, experts, gate and head reaches the prediction, and none
that did not in the captured graph; the prediction depends on exactly one softmax, or one row of a softmax
that holds the gates of all tasks, over the last axis, and that row is the routing weights output (batch, K);
and on exactly one fusion, the weighted sum of expert features (batch, K, D) over K, in which every slot holds
the expert it held when captured. A fusion is recognised in either form: multiply by the weights and sum over
K, or one matrix product.

What a value depends on is followed through stacks and slices (verify/dependencies.py), so the same holds
after any rewrite of te_export.rewrite.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from te_export.capture.joint_graph import EXPERT_FEATURES, JointGraph, prediction_name, routing_weights_name
from te_export.errors import StructureError
from te_export.models.exportable import ExpertFeatures, ExportableModel, TaskOutput
from te_export.partition import PREDICTION, ROUTING_WEIGHTS, GraphSet
from te_export.verify.dependencies import Dependencies, Region, dependencies_of

__all__ = ["check_pruned_structure", "check_structure"]

_VIEWS = {"Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand", "Identity", "Cast"}


@dataclass(frozen=True)
class _Expected:
    """What the captured graph says: which parameters each task's outputs and each expert slot depend on."""

    outputs: Mapping[str, frozenset[str]]
    slots: tuple[frozenset[str], ...]
    sources: Mapping[str, tuple[str, ...]]


def check_structure(graphs: GraphSet, model: ExportableModel, captured: JointGraph) -> None:
    """Prove gate and fusion intact in every graph of a model with expert features.

    Args:
        graphs: as they will be written.
        captured: the joint graph before any rewrite.

    Raises:
        StructureError: naming the graph, the task, and what is missing or too many.
    """
    trunk = model.trunk_parameters
    expected = _expected(captured, model, graphs.sources)
    assert graphs.trunk is not None  # it gives the expert features
    _check_trunk(graphs.trunk.graph, model, expected)
    for joined in graphs.joined:
        _check_softmax_count(joined.graph, expected=len(model.tasks))
    checked: set[ir.Value] = set()
    for task in model.tasks:
        whole = trunk | task.tail_parameters
        for joined, parameters in zip(graphs.joined, (whole, task.tail_parameters), strict=False):
            place = _Place(joined.graph, prediction_name(task.name), routing_weights_name(task.name))
            _check_task(place, task, parameters, model, expected, checked)
        for graph, parameters in (
            (graphs.tasks[task.name].graph, whole),
            (graphs.tails[task.name].graph, task.tail_parameters),
        ):
            _check_task(_Place(graph, PREDICTION, ROUTING_WEIGHTS), task, parameters, model, expected, set())
            _check_softmax_count(graph, expected=1)


def check_pruned_structure(
    pruned: JointGraph, removed: Collection[int], model: ExportableModel, captured: JointGraph
) -> None:
    """Prove that a graph without some experts depends on everything but them.

    Args:
        pruned: the graph of one task, as it will be written.
        removed: the experts that are gone.
        captured: the joint graph before any rewrite.

    Raises:
        StructureError: naming what is missing or was to be gone.
    """
    (task,) = (known for known in model.tasks if known.name in pruned.tasks)
    expected = _Expected(outputs={}, slots=_slot_parameters(captured, model), sources=pruned.sources)
    kept = [slot for expert, slot in enumerate(expected.slots) if expert not in removed]
    gone = frozenset().union(*(expected.slots[expert] for expert in removed)) - frozenset().union(*kept)
    graph = pruned.model.graph
    place = _Place(graph, PREDICTION, ROUTING_WEIGHTS)
    prediction, weights = _output(graph, PREDICTION), _output(graph, ROUTING_WEIGHTS)
    reached = dependencies_of(prediction)
    parameters = (model.trunk_parameters | task.tail_parameters) - gone
    _check_reached(graph, reached, parameters, f"the prediction of {task.name}", expected)
    left = sorted(
        (reached.parameters(pruned.sources) | dependencies_of(weights).parameters(pruned.sources)) & gone
    )
    if left:
        raise StructureError(
            f"{graph.name}: {len(left)} parameters of experts that are gone are still read: {', '.join(left[:8])}"
        )
    _check_shape(graph, prediction, task.output_shape)
    _check_shape(graph, weights, (_sizes(model).num_experts,))
    _check_gate(place, task, reached, weights)
    _check_softmax_count(graph, expected=1)


@dataclass(frozen=True)
class _Place:
    """One task in one graph: the graph, and the names of its two outputs there."""

    graph: ir.Graph
    prediction: str
    routing_weights: str


def _sizes(model: ExportableModel) -> ExpertFeatures:
    assert model.expert_features is not None  # the caller chose this proof for it
    return model.expert_features


def _expected(
    captured: JointGraph, model: ExportableModel, sources: Mapping[str, tuple[str, ...]]
) -> _Expected:
    return _Expected(
        outputs={
            str(value.name): frozenset(dependencies_of(value).parameters(captured.sources))
            for value in captured.model.graph.outputs
        },
        slots=_slot_parameters(captured, model),
        sources=sources,
    )


def _slot_parameters(captured: JointGraph, model: ExportableModel) -> tuple[frozenset[str], ...]:
    features = _output(captured.model.graph, EXPERT_FEATURES)
    return tuple(
        frozenset(dependencies_of(features, _slot(expert)).parameters(captured.sources))
        for expert in range(_sizes(model).num_experts)
    )


def _slot(expert: int) -> Region:
    """One expert of expert features (B, K, D)."""
    return (None, (expert, expert + 1), None)


def _check_trunk(graph: ir.Graph, model: ExportableModel, expected: _Expected) -> None:
    features = _output(graph, EXPERT_FEATURES)
    reached = dependencies_of(features)
    _check_reached(graph, reached, model.trunk_parameters, "the expert features", expected)
    _check_shape(graph, features, (_sizes(model).num_experts, _sizes(model).expert_dim))
    _check_slots(graph, features, expected)


def _check_task(
    place: _Place,
    task: TaskOutput,
    parameters: Collection[str],
    model: ExportableModel,
    expected: _Expected,
    checked: set[ir.Value],
) -> None:
    """Check one task in one graph; `checked` are expert features whose slots were looked at before."""
    graph = place.graph
    prediction, weights = _output(graph, place.prediction), _output(graph, place.routing_weights)
    reached = dependencies_of(prediction)
    _check_reached(graph, reached, parameters, f"the prediction of {task.name}", expected)
    _check_shape(graph, prediction, task.output_shape)
    _check_shape(graph, weights, (_sizes(model).num_experts,))
    gate = _check_gate(place, task, reached, weights)
    for what, found, name in (
        ("prediction", reached, prediction_name(task.name)),
        ("routing weights", dependencies_of(weights), routing_weights_name(task.name)),
    ):
        _check_no_more(graph, found, f"the {what} of {task.name}", expected, name)
    fusions = {node: features for node, features in _weighted_sums(gate, model) if node in reached.nodes}
    if len(fusions) != 1:
        raise StructureError(
            f"{graph.name}: found {len(fusions)} fusions of {_sizes(model).num_experts} experts on the way to the "
            f"prediction of {task.name}, "
            "expected exactly one"
        )
    (features,) = fusions.values()
    if features not in checked:
        checked.add(features)
        _check_slots(graph, features, expected)


def _check_gate(place: _Place, task: TaskOutput, reached: Dependencies, weights: ir.Value) -> ir.Value:
    """The softmax whose row is both the routing weights and what the prediction was made with."""
    softmaxes = [node for node in reached.nodes if node.op_type == "Softmax"]
    if len(softmaxes) == 1 and _is_last_axis(softmaxes[0], softmaxes[0].outputs[0]):
        gates = softmaxes[0].outputs[0]
        shown = dependencies_of(weights).needed.get(gates)
        if _behind_views(weights) is gates and shown == reached.needed[gates]:
            return gates
    raise StructureError(
        f"{place.graph.name}: the prediction of {task.name} depends on {len(softmaxes)} softmax nodes "
        f"({', '.join(str(node.name) for node in softmaxes)}), expected exactly one, over the experts, "
        f"giving {place.routing_weights}"
    )


def _check_slots(graph: ir.Graph, features: ir.Value, expected: _Expected) -> None:
    """Every expert stands where it stood when captured."""
    for expert, parameters in enumerate(expected.slots):
        found = dependencies_of(features, _slot(expert))
        inputs = {
            region
            for value in graph.inputs
            if value.name == EXPERT_FEATURES
            for region in found.needed.get(value, ())
        }
        reached = found.parameters(expected.sources) & frozenset().union(*expected.slots)
        holds = inputs == {_slot(expert)} or len(expected.slots) == 1 if inputs else reached == parameters
        if not holds:
            other = sorted(reached ^ parameters)
            raise StructureError(
                f"{graph.name}: slot {expert} of the expert features does not hold the expert it held when "
                f"captured: {len(other)} parameters differ: {', '.join(other[:8])}"
            )


def _check_reached(
    graph: ir.Graph, found: Dependencies, parameters: Collection[str], what: str, expected: _Expected
) -> None:
    lost = sorted(set(parameters) - found.parameters(expected.sources))
    if lost:
        raise StructureError(
            f"{graph.name}: {len(lost)} of {len(parameters)} parameters do not reach {what}: "
            f"{', '.join(lost[:8])}"
            f"{', …' if len(lost) > 8 else ''}. The graph would give other numbers than the model; nothing "
            "was written."
        )


def _check_no_more(graph: ir.Graph, found: Dependencies, what: str, expected: _Expected, output: str) -> None:
    """Nothing is reached that was not when captured: a row of another task's gate, for one."""
    known = frozenset().union(*expected.outputs.values())
    extra = sorted(found.parameters(expected.sources) & known - expected.outputs[output])
    if extra:
        raise StructureError(
            f"{graph.name}: {len(extra)} parameters reach {what} that do not when captured: "
            f"{', '.join(extra[:8])}{', …' if len(extra) > 8 else ''}"
        )


def _check_shape(graph: ir.Graph, value: ir.Value, tail: tuple[int, ...]) -> None:
    axes = tuple(value.shape)[1:] if value.shape is not None else None
    if axes != tail:
        raise StructureError(
            f"{graph.name}: {value.name} has shape {value.shape}, expected [batch, "
            f"{', '.join(map(str, tail))}]"
        )


def _check_softmax_count(graph: ir.Graph, expected: int) -> None:
    found = sum(_rows(node.outputs[0]) for node in graph if node.op_type == "Softmax")
    if found != expected:
        raise StructureError(f"{graph.name}: has {found} softmax nodes, expected {expected}: one per gate")


def _rows(softmax: ir.Value) -> int:
    """How many gates a softmax holds: 1, or T where it gives (B, T, K)."""
    axes = list(softmax.shape or ())[:-1]
    return math.prod(axis for axis in axes if isinstance(axis, int))


def _output(graph: ir.Graph, name: str) -> ir.Value:
    for value in graph.outputs:
        if value.name == name:
            return value
    raise StructureError(
        f"{graph.name}: has no output {name!r}; its outputs are "
        f"{', '.join(str(v.name) for v in graph.outputs)}"
    )


def _behind_views(value: ir.Value) -> ir.Value:
    """What `value` is a view or a piece of."""
    node = value.producer()
    while (
        node is not None
        and (node.op_type in _VIEWS or node.op_type == "Split")
        and node.inputs[0] is not None
    ):
        value = node.inputs[0]
        node = value.producer()
    return value


def _is_last_axis(softmax: ir.Node, weights: ir.Value) -> bool:
    axis = softmax.attributes.get("axis")
    rank = len(weights.shape) if weights.shape is not None else 0
    return axis is None or axis.as_int() in (-1, rank - 1)


def _weighted_sums(gates: ir.Value, model: ExportableModel) -> Iterable[tuple[ir.Node, ir.Value]]:
    """Nodes that end a sum over K of routing weights times expert features, with those features."""
    shape = (_sizes(model).num_experts, _sizes(model).expert_dim)
    for node in _through_views(gates):
        for index, value in enumerate(node.inputs):
            if value is None or value.shape is None or tuple(value.shape)[1:] != shape:
                continue
            if _behind_views(value) is gates:
                continue
            if node.op_type == "MatMul" and index == 1:
                yield node, value
            elif node.op_type == "Mul":
                for user, _ in node.outputs[0].uses():
                    if user.op_type == "ReduceSum" and _sums_over_experts(user):
                        yield user, value


def _through_views(value: ir.Value) -> list[ir.Node]:
    """Nodes that read `value`, looking through nodes that only reshape or split it."""
    readers = []
    for user, _ in value.uses():
        if user.op_type in _VIEWS or user.op_type == "Split":
            readers += [reader for output in user.outputs for reader in _through_views(output)]
        else:
            readers.append(user)
    return readers


def _sums_over_experts(node: ir.Node) -> bool:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = ir.convenience.get_const_tensor(axes) if axes is not None else None
    return tensor is not None and tensor.numpy().tolist() == [1]

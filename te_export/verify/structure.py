"""Gate and fusion intact: what must be in every graph that is written, proved from the graph itself.

For each task of a graph: every parameter of backbone, experts, gate and head reaches the prediction; the
prediction depends on exactly one softmax, over the last axis, which is the routing weights output (batch,
K); and on exactly one fusion, the weighted sum of expert features (batch, K, D) over K. A fusion is
recognised in either form: multiply by the weights and sum over K, or one matrix product.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx_ir as ir

from te_export.capture.joint_graph import EXPERT_FEATURES, prediction_name, routing_weights_name
from te_export.errors import StructureError
from te_export.models.exportable import ExportableModel, TaskOutput
from te_export.partition import PREDICTION, ROUTING_WEIGHTS, GraphSet

__all__ = ["check_structure"]

_VIEWS = {"Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand", "Identity", "Cast"}


def check_structure(graphs: GraphSet, model: ExportableModel) -> None:
    """Prove gate and fusion intact in every graph.

    Raises:
        StructureError: naming the graph, the task, and what is missing or too many.
    """
    trunk = model.trunk_parameters
    _check_trunk(graphs.trunk.graph, model)
    _check_softmax_count(graphs.joint.graph, expected=len(model.tasks))
    for task in model.tasks:
        whole = trunk | task.tail_parameters
        _check_task(
            graphs.joint.graph,
            task,
            prediction_name(task.name),
            routing_weights_name(task.name),
            whole,
            model,
        )
        _check_task(graphs.tasks[task.name].graph, task, PREDICTION, ROUTING_WEIGHTS, whole, model)
        _check_task(
            graphs.tails[task.name].graph, task, PREDICTION, ROUTING_WEIGHTS, task.tail_parameters, model
        )
        for graph in (graphs.tasks[task.name].graph, graphs.tails[task.name].graph):
            _check_softmax_count(graph, expected=1)


def _check_trunk(graph: ir.Graph, model: ExportableModel) -> None:
    features = _output(graph, EXPERT_FEATURES)
    _check_reached(graph, features, model.trunk_parameters, "the expert features")
    _check_shape(graph, features, (model.num_experts, model.expert_dim))


def _check_task(
    graph: ir.Graph,
    task: TaskOutput,
    prediction_output: str,
    weights_output: str,
    parameters: Collection[str],
    model: ExportableModel,
) -> None:
    prediction = _output(graph, prediction_output)
    weights = _output(graph, weights_output)
    _check_reached(graph, prediction, parameters, f"the prediction of {task.name}")
    _check_shape(graph, prediction, (task.output_dim,))
    _check_shape(graph, weights, (model.num_experts,))
    ancestors = _ancestors(prediction)
    softmaxes = [node for node in ancestors if node.op_type == "Softmax"]
    if [node.outputs[0] for node in softmaxes] != [weights] or not _is_last_axis(softmaxes[0], weights):
        raise StructureError(
            f"{graph.name}: the prediction of {task.name} depends on {len(softmaxes)} softmax nodes "
            f"({', '.join(str(node.name) for node in softmaxes)}), expected exactly one, over the experts, "
            f"giving {weights_output}"
        )
    fusions = [node for node in _weighted_sums(weights, model) if node in ancestors]
    if len(fusions) != 1:
        raise StructureError(
            f"{graph.name}: found {len(fusions)} fusions of {model.num_experts} experts on the way to the "
            f"prediction of {task.name}, "
            "expected exactly one"
        )


def _check_reached(graph: ir.Graph, value: ir.Value, parameters: Collection[str], what: str) -> None:
    reached = {
        source.name
        for node in _ancestors(value)
        for source in node.inputs
        if source is not None and source.is_initializer()
    }
    lost = sorted(set(parameters) - reached)
    if lost:
        raise StructureError(
            f"{graph.name}: {len(lost)} of {len(parameters)} parameters do not reach {what}: "
            f"{', '.join(lost[:8])}"
            f"{', …' if len(lost) > 8 else ''}. The graph would give other numbers than the model; nothing "
            "was written."
        )


def _check_shape(graph: ir.Graph, value: ir.Value, tail: tuple[int, ...]) -> None:
    axes = tuple(value.shape)[1:] if value.shape is not None else None
    if axes != tail:
        raise StructureError(
            f"{graph.name}: {value.name} has shape {value.shape}, expected [batch, "
            f"{', '.join(map(str, tail))}]"
        )


def _check_softmax_count(graph: ir.Graph, expected: int) -> None:
    found = sum(node.op_type == "Softmax" for node in graph)
    if found != expected:
        raise StructureError(f"{graph.name}: has {found} softmax nodes, expected {expected}: one per gate")


def _output(graph: ir.Graph, name: str) -> ir.Value:
    for value in graph.outputs:
        if value.name == name:
            return value
    raise StructureError(
        f"{graph.name}: has no output {name!r}; its outputs are "
        f"{', '.join(str(v.name) for v in graph.outputs)}"
    )


def _ancestors(value: ir.Value) -> dict[ir.Node, None]:
    """Every node that `value` depends on, as an ordered set."""
    seen: dict[ir.Node, None] = {}
    waiting = [value]
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in seen:
            continue
        seen[node] = None
        waiting += [source for source in node.inputs if source is not None]
    return seen


def _is_last_axis(softmax: ir.Node, weights: ir.Value) -> bool:
    axis = softmax.attributes.get("axis")
    rank = len(weights.shape) if weights.shape is not None else 0
    return axis is None or axis.as_int() in (-1, rank - 1)


def _weighted_sums(weights: ir.Value, model: ExportableModel) -> Iterable[ir.Node]:
    """Nodes that end a sum over K of routing weights times expert features."""
    features = {(model.num_experts, model.expert_dim)}
    for node in _through_views(weights):
        others = [value for value in node.inputs if value is not None and not _descends(value, weights)]
        from_experts = any(value.shape is not None and tuple(value.shape)[1:] in features for value in others)
        if node.op_type == "MatMul" and from_experts:
            yield node
        elif node.op_type == "Mul" and from_experts:
            yield from (
                user
                for user, _ in node.outputs[0].uses()
                if user.op_type == "ReduceSum" and _sums_over_experts(user)
            )


def _through_views(value: ir.Value) -> list[ir.Node]:
    """Nodes that read `value`, looking through nodes that only reshape it."""
    readers = []
    for user, _ in value.uses():
        readers += _through_views(user.outputs[0]) if user.op_type in _VIEWS else [user]
    return readers


def _descends(value: ir.Value, source: ir.Value) -> bool:
    return value is source or any(
        source in node.inputs or source in node.outputs for node in _ancestors(value)
    )


def _sums_over_experts(node: ir.Node) -> bool:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = ir.convenience.get_const_tensor(axes) if axes is not None else None
    return tensor is not None and tensor.numpy().tolist() == [1]

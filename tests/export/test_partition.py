"""Task graphs, trunk and tails are what reachability gives, no more and no less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx
import onnx.utils
import onnx_ir as ir
import pytest

from te_export.bundle.graph_file import standalone_bytes
from te_export.capture.joint_graph import EXPERT_FEATURES, JointGraph
from te_export.capture.opset import newest_opset
from te_export.capture.torch_capture import capture
from te_export.errors import StructureError
from te_export.models.exportable import ExportableModel
from te_export.partition import PREDICTION, ROUTING_WEIGHTS, GraphSet, partition

TASKS = ("task_0", "task_1", "task_2")


def names(values: object) -> list[str]:
    return [str(value.name) for value in values]  # type: ignore[attr-defined]


def parameters(graph: ir.Graph) -> set[str]:
    return {name for name in graph.initializers if name.endswith((".weight", ".bias"))}


def baseline(joint: ir.Model, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
    """What onnx's own extractor cuts out of the joint graph."""
    whole = onnx.load_from_string(standalone_bytes(joint, "joint"))
    return onnx.utils.Extractor(whole).extract_model(inputs, outputs)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_graph_has_the_nodes_and_parameters_that_onnx_would_extract(
    task: str, captured: JointGraph, graphs: GraphSet
) -> None:
    expected = baseline(captured.model, ["x"], [f"{task}.prediction", f"{task}.routing_weights"])

    cut = graphs.tasks[task].graph

    assert Counter(node.op_type for node in cut) == Counter(node.op_type for node in expected.graph.node)
    assert set(cut.initializers) == {tensor.name for tensor in expected.graph.initializer}


@pytest.mark.parametrize("task", TASKS)
def test_a_tail_has_the_nodes_and_parameters_that_onnx_would_extract(
    task: str, captured: JointGraph, graphs: GraphSet
) -> None:
    outputs = [f"{task}.prediction", f"{task}.routing_weights"]
    expected = baseline(captured.model, [EXPERT_FEATURES], outputs)

    cut = graphs.tails[task].graph

    assert Counter(node.op_type for node in cut) == Counter(node.op_type for node in expected.graph.node)
    assert set(cut.initializers) == {tensor.name for tensor in expected.graph.initializer}


def test_the_joint_tails_have_the_nodes_and_parameters_that_onnx_would_extract(
    captured: JointGraph, graphs: GraphSet
) -> None:
    expected = baseline(captured.model, [EXPERT_FEATURES], names(graphs.joint.graph.outputs))

    cut = graphs.joint_tails.graph

    assert Counter(node.op_type for node in cut) == Counter(node.op_type for node in expected.graph.node)
    assert set(cut.initializers) == {tensor.name for tensor in expected.graph.initializer}


def test_one_task_has_no_joint_tails(make_model: Callable[..., Any], load: Callable[..., Any]) -> None:
    captured = capture(load(make_model(task_output_dims=(2,)).state_dict()), newest_opset())

    graphs = partition(captured)

    assert set(graphs.tails) == {"task_0"}
    assert graphs.joint_tails is None
    assert graphs.joined == (graphs.joint,)
    assert len(graphs.models) == 4


def test_every_graph_is_changed(graphs: GraphSet) -> None:
    changed = graphs.changed(ir.Model.clone)

    assert [model.graph.name for model in changed.models] == [model.graph.name for model in graphs.models]
    assert not set(map(id, changed.models)) & set(map(id, graphs.models))


def test_each_graph_holds_the_parameters_of_its_part(graphs: GraphSet, exportable: ExportableModel) -> None:
    trunk = exportable.trunk_parameters

    assert parameters(graphs.trunk.graph) == trunk
    assert parameters(graphs.joint.graph) == exportable.used_parameters
    for task in exportable.tasks:
        assert parameters(graphs.tasks[task.name].graph) == trunk | task.tail_parameters
        assert parameters(graphs.tails[task.name].graph) == task.tail_parameters
    assert parameters(graphs.joint_tails.graph) == exportable.used_parameters - trunk


def test_inputs_and_outputs_have_the_names_of_the_format(graphs: GraphSet) -> None:
    assert names(graphs.joint.graph.inputs) == ["x"]
    assert names(graphs.joint.graph.outputs) == [
        f"{task}.{output}" for task in TASKS for output in (PREDICTION, ROUTING_WEIGHTS)
    ]
    assert (names(graphs.trunk.graph.inputs), names(graphs.trunk.graph.outputs)) == (["x"], [EXPERT_FEATURES])
    assert names(graphs.joint_tails.graph.inputs) == [EXPERT_FEATURES]
    assert names(graphs.joint_tails.graph.outputs) == names(graphs.joint.graph.outputs)
    for task in TASKS:
        assert names(graphs.tasks[task].graph.inputs) == ["x"]
        assert names(graphs.tails[task].graph.inputs) == [EXPERT_FEATURES]
        for graph in (graphs.tasks[task].graph, graphs.tails[task].graph):
            assert names(graph.outputs) == [PREDICTION, ROUTING_WEIGHTS]


def test_cutting_leaves_the_captured_graph_as_it_was(own_capture: JointGraph) -> None:
    before = standalone_bytes(own_capture.model, "joint")

    partition(own_capture)

    assert standalone_bytes(own_capture.model, "joint") == before


def test_all_graphs_share_the_same_tensors(graphs: GraphSet, captured: JointGraph) -> None:
    name = "experts.2.network.3.weight"
    tensor = captured.model.graph.initializers[name].const_value

    for model in (graphs.joint, graphs.trunk, *graphs.tasks.values()):
        assert model.graph.initializers[name].const_value is tensor


def test_initializers_stand_in_the_order_that_nodes_read_them(graphs: GraphSet) -> None:
    for model in graphs.models:
        read = [v.name for node in model.graph for v in node.inputs if v is not None and v.is_initializer()]
        assert list(model.graph.initializers) == list(dict.fromkeys(read))


def test_cutting_twice_gives_the_same_bytes(captured: JointGraph) -> None:
    first, second = partition(captured), partition(captured)

    for one, other in zip(first.models, second.models, strict=True):
        assert standalone_bytes(one, "graph") == standalone_bytes(other, "graph")


def test_a_tail_that_reads_the_trunk_past_the_expert_features_is_refused(own_capture: JointGraph) -> None:
    graph = own_capture.model.graph
    (gate,) = [node for node in graph if node.name == "gating_networks.1.gate.0"]
    (hidden,) = [node for node in graph if node.name == "experts.0.network.6"]
    gate.replace_input_with(0, hidden.outputs[0])

    with pytest.raises(StructureError, match="tail-task_1 cannot be cut out of the joint graph"):
        partition(own_capture)


def test_an_output_that_is_not_there_is_refused(own_capture: JointGraph) -> None:
    unknown = JointGraph(model=own_capture.model, tasks=("nobody",), opset=own_capture.opset)

    with pytest.raises(StructureError, match=r"task-nobody cannot be cut out .*'nobody\.prediction'"):
        partition(unknown)


def test_routing_weights_alone_are_no_task(own_capture: JointGraph) -> None:
    outputs = own_capture.model.graph.outputs
    (position,) = [index for index, value in enumerate(outputs) if value.name == "task_1.prediction"]
    outputs[position].name = "elsewhere"

    with pytest.raises(StructureError, match=r"task-task_1 cannot be cut out .*'task_1\.prediction'"):
        partition(own_capture)

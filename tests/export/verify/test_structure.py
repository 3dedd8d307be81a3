"""Every way of losing an expert, a gate or a fusion is refused, with a message of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from te_export.capture.joint_graph import JointGraph
from te_export.errors import StructureError
from te_export.models.exportable import ExpertFeatures, ExportableModel
from te_export.partition import GraphSet, partition
from te_export.verify.structure import check_structure

TASK = "task_1"

Mutation = Callable[[ir.Graph], None]
Which = Callable[[GraphSet], ir.Model]

WHERE: dict[str, Which] = {
    "joint": lambda graphs: graphs.joint,
    f"task-{TASK}": lambda graphs: graphs.tasks[TASK],
    f"tail-{TASK}": lambda graphs: graphs.tails[TASK],
}


def node(graph: ir.Graph, name: str) -> ir.Node:
    (found,) = [node for node in graph if node.name == name]
    return found


def gate_of(graph: ir.Graph) -> ir.Node:
    """The softmax of TASK's gate."""
    logits = node(graph, "gating_networks.1.gate.2").outputs[0]
    (softmax,) = [user for user, _ in logits.uses()]
    assert softmax.op_type == "Softmax"
    return softmax


def readers(value: ir.Value, op_type: str) -> list[ir.Node]:
    return [user for user, _ in value.uses() if user.op_type == op_type]


def fusion_of(graph: ir.Graph) -> tuple[ir.Node, ir.Node]:
    """Multiplication and sum of TASK's fusion."""
    (view,) = readers(gate_of(graph).outputs[0], "Unsqueeze")
    (product,) = readers(view.outputs[0], "Mul")
    (total,) = readers(product.outputs[0], "ReduceSum")
    return product, total


def constant(graph: ir.Graph, name: str, values: object, dtype: type = np.int64) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.asarray(values, dtype), name=name))
    value.shape = ir.Shape(np.asarray(values, dtype).shape)
    graph.register_initializer(value)
    return value


def insert(
    graph: ir.Graph, after: ir.Node, op_type: str, inputs: list[ir.Value], shape: list[int | str], **kept: int
) -> ir.Value:
    new = ir.Node(
        "", op_type, inputs, attributes=ir.convenience.convert_attributes(kept), name=f"new_{op_type}"
    )
    new.outputs[0].shape = ir.Shape(shape)
    new.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_after(after, new)
    return new.outputs[0]


def reads_another_expert(graph: ir.Graph) -> None:
    for layer in (0, 3, 6):
        gemm = node(graph, f"experts.1.network.{layer}")
        for index, kind in ((1, "weight"), (2, "bias")):
            gemm.replace_input_with(index, graph.initializers[f"experts.0.network.{layer}.{kind}"])


def sigmoid_for_softmax(graph: ir.Graph) -> None:
    gate = gate_of(graph)
    gate.op_type = "Sigmoid"
    gate.attributes.clear()


def softmax_over_rows(graph: ir.Graph) -> None:
    gate = gate_of(graph)
    gate.attributes["axis"] = ir.AttrInt64("axis", 0)


def softmax_on_the_prediction(graph: ir.Graph) -> None:
    head = node(graph, "task_heads.1.head.0")
    softmax = insert(graph, head, "Softmax", [head.outputs[0]], ["batch", 4], axis=-1)
    (relu,) = readers(head.outputs[0], "Relu")
    relu.replace_input_with(0, softmax)


def softmax_twice_in_a_row(graph: ir.Graph) -> None:
    gate = gate_of(graph)
    again = insert(graph, gate, "Softmax", [gate.outputs[0]], ["batch", 3], axis=-1)
    (view,) = readers(gate.outputs[0], "Unsqueeze")
    view.replace_input_with(0, again)


def mean_for_sum(graph: ir.Graph) -> None:
    fusion_of(graph)[1].op_type = "ReduceMean"


def add_for_multiply(graph: ir.Graph) -> None:
    fusion_of(graph)[0].op_type = "Add"


def sum_over_features(graph: ir.Graph) -> None:
    total = fusion_of(graph)[1]
    total.replace_input_with(1, constant(graph, "axis_2", [2]))


def sum_over_everything(graph: ir.Graph) -> None:
    total = fusion_of(graph)[1]
    total.replace_input_with(1, constant(graph, "both_axes", [1, 2]))


def fusion_over_two_experts(graph: ir.Graph) -> None:
    product, _ = fusion_of(graph)
    bounds = [constant(graph, name, [value]) for name, value in (("from", 0), ("to", 2), ("axis", 1))]
    producers = [value.producer() for value in product.inputs if value is not None]
    last = next(n for n in reversed(list(graph)) if n in producers)
    for index, value in enumerate(list(product.inputs)):
        assert value is not None
        assert value.shape is not None
        few = insert(graph, last, "Slice", [value, *bounds], ["batch", 2, *list(value.shape)[2:]])
        product.replace_input_with(index, few)
    product.outputs[0].shape = ir.Shape(["batch", 2, 8])


def fusion_without_the_experts(graph: ir.Graph) -> None:
    product, _ = fusion_of(graph)
    (index,) = [i for i, v in enumerate(product.inputs) if v is not None and str(v.shape) == "[batch,3,8]"]
    head = node(graph, "task_heads.1.head.0")
    features = product.inputs[index]
    assert features is not None
    product.replace_input_with(index, constant(graph, "ones", np.ones((3, 8)), np.float32))
    first = constant(graph, "first", 0)
    picked = insert(graph, product, "Gather", [features, first], ["batch", 8], axis=1)
    total = fusion_of(graph)[1]
    mixed = insert(graph, total, "Add", [total.outputs[0], picked], ["batch", 8])
    head.replace_input_with(0, mixed)


def fusion_twice(graph: ir.Graph) -> None:
    product, total = fusion_of(graph)
    axes = total.inputs[1]
    assert axes is not None
    again = insert(graph, total, "ReduceSum", [product.outputs[0], axes], ["batch", 8], keepdims=0)
    both = insert(graph, again.producer(), "Add", [total.outputs[0], again], ["batch", 8])  # type: ignore[arg-type]
    node(graph, "task_heads.1.head.0").replace_input_with(0, both)


def gate_of_another_task(graph: ir.Graph) -> None:
    """The joint graph only: fuse with task_0's routing weights, and put those out too."""
    other = node(graph, "gating_networks.0.gate.2").outputs[0]
    gate_of(graph).replace_input_with(0, other)


def drop_output(graph: ir.Graph) -> None:
    position = next(i for i, v in enumerate(graph.outputs) if str(v.name).endswith("routing_weights"))
    graph.outputs.pop(position)


LOST = r"6 of \d+ parameters do not reach the prediction of task_1: experts\.1\.network\.0\.bias"
NO_FUSION = "found 0 fusions of 3 experts on the way to the prediction of task_1"

IN_EVERY_GRAPH: list[tuple[Mutation, str]] = [
    (softmax_over_rows, r"depends on 1 softmax nodes \(softmax_\d\), expected exactly one, over the experts"),
    (mean_for_sum, NO_FUSION),
    (add_for_multiply, NO_FUSION),
    (sum_over_features, NO_FUSION),
    (sum_over_everything, NO_FUSION),
    (fusion_over_two_experts, NO_FUSION),
    (fusion_without_the_experts, NO_FUSION),
    (fusion_twice, "found 2 fusions of 3 experts on the way to the prediction of task_1"),
]


def test_graphs_as_captured_pass(graphs: GraphSet, exportable: ExportableModel, captured: JointGraph) -> None:
    check_structure(graphs, exportable, captured)


@pytest.mark.parametrize("where", list(WHERE))
@pytest.mark.parametrize(("mutate", "problem"), IN_EVERY_GRAPH, ids=lambda v: getattr(v, "__name__", ""))
def test_a_broken_gate_or_fusion_is_refused_in_every_graph(
    where: str,
    mutate: Mutation,
    problem: str,
    graphs: GraphSet,
    exportable: ExportableModel,
    captured: JointGraph,
) -> None:
    mutate(WHERE[where](graphs).graph)

    with pytest.raises(StructureError, match=problem) as caught:
        check_structure(graphs, exportable, captured)

    assert str(caught.value).startswith(f"{where}: ")


@pytest.mark.parametrize("where", ["joint", f"task-{TASK}"])
def test_a_lost_expert_is_refused_with_its_parameters(
    where: str, graphs: GraphSet, exportable: ExportableModel, captured: JointGraph
) -> None:
    reads_another_expert(WHERE[where](graphs).graph)

    with pytest.raises(StructureError) as caught:
        check_structure(graphs, exportable, captured)

    message = str(caught.value)
    assert message.startswith(f"{where}: 6 of ")
    assert "parameters do not reach the prediction of task_" in message
    for layer in (0, 3, 6):
        assert f"experts.1.network.{layer}.weight" in message


def test_an_expert_lost_before_the_cut_is_refused(
    own_capture: JointGraph, exportable: ExportableModel, captured: JointGraph
) -> None:
    reads_another_expert(own_capture.model.graph)

    with pytest.raises(StructureError, match="trunk: 6 of 24 parameters do not reach the expert features"):
        check_structure(partition(own_capture), exportable, captured)


@pytest.mark.parametrize("parameter", ["backbone.network.3.bias", "task_heads.1.head.3.bias"])
def test_one_lost_bias_is_refused_by_name(
    parameter: str, own_capture: JointGraph, exportable: ExportableModel, captured: JointGraph
) -> None:
    gemm = node(own_capture.model.graph, parameter.removesuffix(".bias"))
    gemm.replace_input_with(2, None)

    with pytest.raises(StructureError, match=f"1 of .* parameters do not reach .*: {parameter}"):
        check_structure(partition(own_capture), exportable, captured)


@pytest.mark.parametrize("where", [f"task-{TASK}", f"tail-{TASK}"])
def test_a_gate_without_softmax_is_refused(
    where: str, graphs: GraphSet, exportable: ExportableModel, captured: JointGraph
) -> None:
    sigmoid_for_softmax(WHERE[where](graphs).graph)

    with pytest.raises(StructureError, match=rf"{where}: .* depends on 0 softmax nodes .*routing_weights"):
        check_structure(graphs, exportable, captured)


def test_the_joint_graph_has_one_softmax_per_gate(
    graphs: GraphSet, exportable: ExportableModel, captured: JointGraph
) -> None:
    sigmoid_for_softmax(graphs.joint.graph)

    with pytest.raises(StructureError, match="joint: has 2 softmax nodes, expected 3: one per gate"):
        check_structure(graphs, exportable, captured)


@pytest.mark.parametrize("mutate", [softmax_on_the_prediction, softmax_twice_in_a_row])
@pytest.mark.parametrize("where", [f"task-{TASK}", f"tail-{TASK}"])
def test_a_second_softmax_is_refused(
    where: str, mutate: Mutation, graphs: GraphSet, exportable: ExportableModel, captured: JointGraph
) -> None:
    mutate(WHERE[where](graphs).graph)

    with pytest.raises(StructureError, match=rf"{where}: .* depends on 2 softmax nodes"):
        check_structure(graphs, exportable, captured)


def test_a_softmax_beside_the_way_to_the_prediction_is_refused(
    graphs: GraphSet, exportable: ExportableModel, captured: JointGraph
) -> None:
    graph = graphs.tasks[TASK].graph
    gate = gate_of(graph)
    insert(graph, gate, "Softmax", [gate.outputs[0]], ["batch", 3], axis=-1)

    with pytest.raises(StructureError, match=f"task-{TASK}: has 2 softmax nodes, expected 1"):
        check_structure(graphs, exportable, captured)


def test_fusing_with_another_tasks_gate_is_refused(
    graphs: GraphSet, exportable: ExportableModel, captured: JointGraph
) -> None:
    gate_of_another_task(graphs.joint.graph)

    with pytest.raises(StructureError, match=r"joint: 4 of .* gating_networks\.1\.gate\.0\.bias"):
        check_structure(graphs, exportable, captured)


@pytest.mark.parametrize("where", list(WHERE))
def test_routing_weights_must_be_an_output(
    where: str, graphs: GraphSet, exportable: ExportableModel, captured: JointGraph
) -> None:
    drop_output(WHERE[where](graphs).graph)

    with pytest.raises(StructureError, match=rf"{where}: has no output '.*routing_weights'; its outputs are"):
        check_structure(graphs, exportable, captured)


def test_another_number_of_experts_is_refused(
    graphs: GraphSet, exportable: ExportableModel, captured: JointGraph
) -> None:
    other = dataclasses.replace(exportable, expert_features=ExpertFeatures(num_experts=4, expert_dim=8))

    with pytest.raises(
        StructureError, match=r"trunk: expert_features has shape \[batch,3,8\], expected \[batch, 4, 8\]"
    ):
        check_structure(graphs, other, captured)


def test_another_output_width_is_refused(
    graphs: GraphSet, exportable: ExportableModel, captured: JointGraph
) -> None:
    tasks = tuple(dataclasses.replace(task, output_shape=(task.output_dim + 1,)) for task in exportable.tasks)

    with pytest.raises(StructureError, match=r"task_0\.prediction has shape \[batch,4\], expected"):
        check_structure(graphs, dataclasses.replace(exportable, tasks=tasks), captured)


@pytest.mark.parametrize("axis", [1, -1, None])
def test_the_last_axis_may_be_written_in_any_way(
    axis: int | None, graphs: GraphSet, exportable: ExportableModel, captured: JointGraph
) -> None:
    gate = gate_of(graphs.tasks[TASK].graph)
    del gate.attributes["axis"]
    if axis is not None:
        gate.attributes["axis"] = ir.AttrInt64("axis", axis)

    check_structure(graphs, exportable, captured)


def test_a_fusion_written_as_one_matrix_product_passes(
    graphs: GraphSet, exportable: ExportableModel, captured: JointGraph
) -> None:
    graph = graphs.tasks[TASK].graph
    _, total = fusion_of(graph)
    gate = gate_of(graph)
    (features,) = [
        v for n in graph for v in n.outputs if str(v.shape) == "[batch,3,8]" and n.op_type == "Concat"
    ]
    axis = constant(graph, "one", [1])
    row = insert(graph, gate, "Unsqueeze", [gate.outputs[0], axis], ["batch", 1, 3])
    product = insert(graph, row.producer(), "MatMul", [row, features], ["batch", 1, 8])  # type: ignore[arg-type]
    flat = insert(graph, product.producer(), "Squeeze", [product, axis], ["batch", 8])  # type: ignore[arg-type]
    node(graph, "task_heads.1.head.0").replace_input_with(0, flat)
    graph.remove(total, safe=True)

    check_structure(graphs, exportable, captured)

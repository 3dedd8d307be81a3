"""What each output of a traced module's graphs depends on: every loss, swap and addition is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from te_export.capture.joint_graph import JointGraph
from te_export.capture.opset import newest_opset
from te_export.capture.torch_capture import capture
from te_export.errors import StructureError
from te_export.models.exportable import ExportableModel
from te_export.modules.exportable_module import make_exportable
from te_export.partition import GraphSet, partition
from te_export.verify.reachability import check_reachability

FEATURES, EXPERTS, WIDTH = 4, 3, 5
Which = Callable[[GraphSet], ir.Model]
WHERE: dict[str, Which] = {
    "joint": lambda graphs: graphs.joint,
    "task-buy": lambda graphs: graphs.tasks["buy"],
    "tail-buy": lambda graphs: graphs.tails["buy"],
}


class Mmoe(nn.Module):
    """Two tasks, each with a gate and a tower."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(FEATURES, WIDTH) for _ in range(EXPERTS))
        self.gates = nn.ModuleDict({task: nn.Linear(FEATURES, EXPERTS) for task in ("click", "buy")})
        self.towers = nn.ModuleDict({task: nn.Linear(WIDTH, 2) for task in ("click", "buy")})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        experts = torch.stack([torch.relu(expert(x)) for expert in self.experts], 1)
        return {
            task: tower((torch.softmax(self.gates[task](x), 1).unsqueeze(2) * experts).sum(1))
            for task, tower in self.towers.items()
        }


@pytest.fixture(scope="module")
def model() -> ExportableModel:
    rows = np.random.default_rng(0).standard_normal((6, FEATURES)).astype(np.float32)
    return make_exportable(Mmoe().eval(), rows)


@pytest.fixture(scope="module")
def joint(model: ExportableModel) -> JointGraph:
    """Not to be changed."""
    return capture(model, newest_opset())


@pytest.fixture
def graphs(joint: JointGraph) -> GraphSet:
    """Graphs that the test may change."""
    return partition(JointGraph(model=joint.model.clone(), tasks=joint.tasks, opset=joint.opset))


def initializer(graph: ir.Graph, name: str) -> ir.Value:
    return graph.initializers[name]


def readers(graph: ir.Graph, name: str) -> list[tuple[ir.Node, int]]:
    return [(use.node, use.idx) for use in initializer(graph, name).uses()]


def give(graph: ir.Graph, output: str, value: ir.Value) -> None:
    """Put a node in front of an output that gives another value under its name."""
    (index,) = (i for i, found in enumerate(graph.outputs) if str(found.name).endswith(output))
    old = graph.outputs[index]
    name, old.name = old.name, f"{old.name}_before"
    node = ir.node("Identity", [value])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype = name, old.shape, old.dtype
    graph.append(node)
    graph.outputs[index] = node.outputs[0]


def add_to(graph: ir.Graph, output: str, value: ir.Value) -> None:
    """Add a value to an output."""
    (old,) = (found for found in graph.outputs if str(found.name).endswith(output))
    node = ir.node("Add", [old, value])
    node.outputs[0].shape, node.outputs[0].dtype = old.shape, old.dtype
    graph.append(node)
    give(graph, output, node.outputs[0])


def test_graphs_as_they_were_cut_pass(graphs: GraphSet, model: ExportableModel, joint: JointGraph) -> None:
    assert graphs.trunk is not None
    assert set(graphs.tails) == {"click", "buy"}
    check_reachability(graphs, model, joint)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    "parameter", ["towers.buy.weight", "towers.buy.bias", "gates.buy.weight", "gates.buy.bias"]
)
def test_a_dropped_parameter_is_refused(
    where: str, parameter: str, graphs: GraphSet, model: ExportableModel, joint: JointGraph
) -> None:
    graph = WHERE[where](graphs).graph
    zeros = ir.tensor(np.zeros(initializer(graph, parameter).shape.numpy(), np.float32), name="zeros")  # type: ignore[union-attr]
    value = ir.Value(name="zeros", const_value=zeros, shape=zeros.shape, type=ir.TensorType(zeros.dtype))
    graph.register_initializer(value)
    for node, index in readers(graph, parameter):
        node.replace_input_with(index, value)

    with pytest.raises(StructureError, match=rf"{where}: 1 parameters do not reach buy.*: {parameter}"):
        check_reachability(graphs, model, joint)


@pytest.mark.parametrize("name", ["joint", "trunk"])
def test_a_dropped_expert_is_refused(
    name: str, graphs: GraphSet, model: ExportableModel, joint: JointGraph
) -> None:
    found = graphs.joint if name == "joint" else graphs.trunk
    assert found is not None
    for part in ("weight", "bias"):
        for node, index in readers(found.graph, f"experts.1.{part}"):
            node.replace_input_with(index, initializer(found.graph, f"experts.0.{part}"))

    with pytest.raises(
        StructureError, match=r"2 parameters do not reach .*: experts.1.bias, experts.1.weight"
    ):
        check_reachability(graphs, model, joint)


@pytest.mark.parametrize("where", ["joint", "joint-tails"])
@pytest.mark.parametrize("output", ["prediction", "routing_weights"])
def test_swapped_tasks_are_refused(
    output: str, where: str, graphs: GraphSet, model: ExportableModel, joint: JointGraph
) -> None:
    (graph,) = [found.graph for found in graphs.joined if found.graph.name == where]
    values = {str(value.name): value for value in graph.outputs}
    click, buy = values[f"click.{output}"], values[f"buy.{output}"]
    give(graph, f"click.{output}", buy)
    give(graph, f"buy.{output}", click)

    with pytest.raises(StructureError, match=rf"{where}: \d parameters do not reach click.{output}: .*click"):
        check_reachability(graphs, model, joint)


def test_swapped_task_graphs_are_refused(graphs: GraphSet, model: ExportableModel, joint: JointGraph) -> None:
    graphs.tasks["click"], graphs.tasks["buy"] = graphs.tasks["buy"], graphs.tasks["click"]

    with pytest.raises(StructureError, match=r"do not reach click.prediction: .*click"):
        check_reachability(graphs, model, joint)


def test_swapped_tails_are_refused(graphs: GraphSet, model: ExportableModel, joint: JointGraph) -> None:
    graphs.tails["click"], graphs.tails["buy"] = graphs.tails["buy"], graphs.tails["click"]

    with pytest.raises(StructureError, match=r"do not reach click.prediction: .*click"):
        check_reachability(graphs, model, joint)


def test_a_dependency_on_the_other_task_is_refused(
    graphs: GraphSet, model: ExportableModel, joint: JointGraph
) -> None:
    add_to(graphs.joint.graph, "buy.prediction", initializer(graphs.joint.graph, "towers.click.bias"))

    with pytest.raises(
        StructureError,
        match=r"joint: 1 parameters reach, and did not when captured, buy.prediction: towers.click.bias",
    ):
        check_reachability(graphs, model, joint)


def test_routing_weights_that_read_a_tower_are_refused(
    graphs: GraphSet, model: ExportableModel, joint: JointGraph
) -> None:
    graph = graphs.tasks["buy"].graph
    (prediction,) = (value for value in graph.outputs if value.name == "prediction")
    give(graph, "routing_weights", prediction)

    with pytest.raises(StructureError, match=r"task-buy: \d+ parameters reach, .* buy.routing_weights"):
        check_reachability(graphs, model, joint)


@pytest.mark.parametrize("where", WHERE)
def test_routing_weights_that_no_softmax_gives_are_refused(
    where: str, graphs: GraphSet, model: ExportableModel, joint: JointGraph
) -> None:
    graph = WHERE[where](graphs).graph
    (weights,) = (
        value for value in graph.outputs if str(value.name) in ("routing_weights", "buy.routing_weights")
    )
    softmax = weights.producer()
    while softmax is not None and softmax.op_type != "Softmax":
        assert softmax.inputs[0] is not None
        softmax = softmax.inputs[0].producer()
    assert softmax is not None
    softmax.op_type = "Sigmoid"
    softmax.attributes.clear()

    with pytest.raises(
        StructureError, match=rf"{where}: .*routing_weights is made by Sigmoid, expected a Softmax"
    ):
        check_reachability(graphs, model, joint)


@pytest.mark.parametrize("where", ["joint", "task-buy"])
def test_routing_weights_that_the_prediction_was_not_made_with_are_refused(
    where: str, graphs: GraphSet, model: ExportableModel, joint: JointGraph
) -> None:
    """The same layers read once more: nothing but the place of the weights tells it."""
    graph = WHERE[where](graphs).graph
    (weights,) = (
        value for value in graph.outputs if str(value.name) in ("routing_weights", "buy.routing_weights")
    )
    softmax = weights.producer()
    assert softmax is not None
    again = ir.Node("", "Softmax", softmax.inputs, attributes=list(softmax.attributes.values()))
    again.outputs[0].shape, again.outputs[0].dtype = weights.shape, weights.dtype
    graph.append(again)
    give(graph, "buy.routing_weights" if where == "joint" else "routing_weights", again.outputs[0])

    with pytest.raises(
        StructureError, match=rf"{where}: .*not the weights that the prediction was made with"
    ):
        check_reachability(graphs, model, joint)


def test_a_parameter_lost_in_the_capture_is_refused(
    graphs: GraphSet, model: ExportableModel, joint: JointGraph
) -> None:
    lost = JointGraph(model=joint.model.clone(), tasks=joint.tasks, opset=joint.opset)
    graph = lost.model.graph
    for node, index in readers(graph, "towers.click.bias"):
        node.replace_input_with(index, initializer(graph, "towers.buy.bias"))

    with pytest.raises(
        StructureError, match=r"joint as captured: 1 parameters do not reach click.prediction"
    ):
        check_reachability(graphs, model, lost)

"""Dropping or swapping an expert, a gate or a head is refused in rewritten graphs too, where stacks hide them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import onnx_ir as ir
import pytest

from te_export.capture.joint_graph import JointGraph
from te_export.errors import StructureError
from te_export.models.exportable import ExportableModel
from te_export.partition import GraphSet, partition
from te_export.rewrite import batching_policy
from te_export.rewrite.rewrite import rewrite, rewrite_cut
from te_export.rewrite.stack import Stack, stack_of
from te_export.verify.structure import check_structure

FORMS = ("cpu", "cpu, large layers", "cuda")
TASK = "task_1"

Attack = Callable[[ir.Graph], None]
Check = Callable[[GraphSet], None]


@pytest.fixture(params=FORMS)
def rewritten(
    request: pytest.FixtureRequest, captured: JointGraph, monkeypatch: pytest.MonkeyPatch
) -> GraphSet:
    """SMALL rewritten, with its layers batched, with them apart, and for CUDA."""
    if request.param == "cpu, large layers":
        monkeypatch.setattr(batching_policy, "SMALL_WEIGHTS", 0)
    provider: Literal["cpu", "cuda"] = "cuda" if request.param == "cuda" else "cpu"
    before = rewrite(captured, provider=provider, level="exact")
    graphs, _ = rewrite_cut(partition(before.graph), captured, before.log, provider=provider, level="exact")
    return graphs


@pytest.fixture
def check(exportable: ExportableModel, captured: JointGraph) -> Check:
    return lambda graphs: check_structure(graphs, exportable, captured)


def stacks(graph: ir.Graph, part: str) -> list[ir.Value]:
    """The stacked initializers that have a part of this name, or made of it."""
    return [
        value
        for value in graph.initializers.values()
        if (stack := stack_of(value.const_value)) is not None
        and any(entry.name.startswith(part) for entry in stack.parts)
    ]


def rearrange(value: ir.Value, order: Sequence[int]) -> None:
    """The first layers of a stack become those that stood at the places of `order`."""
    tensor = value.const_value
    stack = stack_of(tensor)
    assert stack is not None
    assert tensor is not None
    parts = (*(stack.parts[place] for place in order), *stack.parts[len(order) :])
    value.const_value = ir.Tensor(
        Stack(parts, stack.axes), tensor.dtype, shape=ir.Shape(stack.axes), name=value.name
    )


def swap_parts(value: ir.Value) -> None:
    """The first two layers of a stack change places."""
    rearrange(value, (1, 0))


def repeat_part(value: ir.Value) -> None:
    """The first layer of a stack takes the place of the second."""
    rearrange(value, (0, 0))


def node(graph: ir.Graph, name: str) -> ir.Node:
    (found,) = [node for node in graph if node.name == name]
    return found


def test_rewritten_graphs_pass(rewritten: GraphSet, check: Check) -> None:
    check(rewritten)


@pytest.mark.parametrize("where", ["joint", "joint-tails"])
@pytest.mark.parametrize("change", [swap_parts, repeat_part])
@pytest.mark.parametrize("part", ["gating_networks.0.gate.0.weight", "gating_networks.0.gate.0.bias"])
def test_gates_that_change_places_in_a_stack_are_refused(
    where: str, change: Callable[[ir.Value], None], part: str, rewritten: GraphSet, check: Check
) -> None:
    model = rewritten.joint if where == "joint" else rewritten.joint_tails
    (stack,) = stacks(model.graph, part)
    change(stack)

    with pytest.raises(
        StructureError, match=rf"{where}: 1 of .* do not reach the prediction of task_[01]: gating"
    ):
        check(rewritten)


@pytest.mark.parametrize("where", ["joint", "trunk", TASK])
@pytest.mark.parametrize("part", ["experts.0.network.0.weight", "experts.0.network.0.bias"])
def test_experts_that_change_places_in_a_stack_are_refused(
    where: str, part: str, rewritten: GraphSet, check: Check
) -> None:
    """Every parameter still reaches every prediction; only the slots tell."""
    models = {"joint": rewritten.joint, "trunk": rewritten.trunk, TASK: rewritten.tasks[TASK]}
    (stack,) = stacks(models[where].graph, part)
    swap_parts(stack)

    with pytest.raises(
        StructureError, match="slot 0 of the expert features does not hold the expert it held"
    ):
        check(rewritten)


@pytest.mark.parametrize("where", ["joint", "trunk", TASK])
def test_an_expert_that_is_dropped_from_a_stack_is_refused(
    where: str, rewritten: GraphSet, check: Check
) -> None:
    models = {"joint": rewritten.joint, "trunk": rewritten.trunk, TASK: rewritten.tasks[TASK]}
    (stack,) = stacks(models[where].graph, "experts.0.network.0.weight")
    repeat_part(stack)

    with pytest.raises(StructureError, match=r"1 of .* do not reach .*: experts\.1\.network\.0\.weight"):
        check(rewritten)


def test_whole_experts_in_each_others_place_are_refused(rewritten: GraphSet, check: Check) -> None:
    """Every layer of two experts, in every stack or node: the routing weights would go to the wrong ones."""
    for model in (rewritten.joint, rewritten.trunk, *rewritten.tasks.values()):
        graph = model.graph
        concats = [node for node in graph if node.op_type == "Concat" and len(node.inputs) == 3]
        if concats:
            first, second = concats[0].inputs[:2]
            concats[0].replace_input_with(0, second)
            concats[0].replace_input_with(1, first)
            continue
        for layer in (0, 3, 6):
            for kind in ("weight", "bias"):
                for stack in stacks(graph, f"experts.0.network.{layer}.{kind}"):
                    swap_parts(stack)

    with pytest.raises(StructureError, match="trunk: slot 0 of the expert features does not hold the expert"):
        check(rewritten)


def test_routing_weights_put_out_for_another_task_are_refused(rewritten: GraphSet, check: Check) -> None:
    outputs = {value.name: value for value in rewritten.joint.graph.outputs}
    first, second = outputs["task_0.routing_weights"], outputs["task_1.routing_weights"]
    first.name, second.name = "task_1.routing_weights", "task_0.routing_weights"

    with pytest.raises(StructureError, match=r"joint: the prediction of task_0 depends on 1 softmax nodes"):
        check(rewritten)


def test_fused_features_that_reach_another_head_are_refused(rewritten: GraphSet, check: Check) -> None:
    graph = rewritten.joint.graph
    splits = [node for node in graph if node.op_type == "Split" and str(node.name).startswith("fusions")]
    if splits:
        first, second = splits[0].outputs[:2]
        (one,), (two,) = [tuple(value.uses()) for value in (first, second)]
        one.node.replace_input_with(one.idx, second)
        two.node.replace_input_with(two.idx, first)
    else:  # heads are batched: their weights change places instead
        for kind in ("weight", "bias"):
            for stack in stacks(graph, f"task_heads.0.head.0.{kind}"):
                swap_parts(stack)

    with pytest.raises(StructureError, match=r"joint: \d of .* do not reach the prediction of task_[01]"):
        check(rewritten)


def softmax_over_tasks(graph: ir.Graph) -> None:
    node(graph, "gates").attributes["axis"] = ir.AttrInt64("axis", 1)


def weights_from_ones(graph: ir.Graph) -> None:
    """The fusion is made with something else than the gates."""
    product = node(graph, "fusions")
    gates = product.inputs[0]
    again = ir.Node("", "Tanh", [gates], name="other")  # type: ignore[list-item]
    again.outputs[0].shape = gates.shape  # type: ignore[union-attr]
    again.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(product, again)
    product.replace_input_with(0, again.outputs[0])


@pytest.mark.parametrize("where", ["joint", "joint-tails"])
@pytest.mark.parametrize(
    ("attack", "problem"),
    [
        (softmax_over_tasks, "depends on 1 softmax nodes .gates., expected exactly one, over the experts"),
        (weights_from_ones, "found 0 fusions of 3 experts"),
    ],
)
def test_a_broken_block_of_gates_is_refused(
    where: str, attack: Attack, problem: str, rewritten: GraphSet, check: Check
) -> None:
    graph = (rewritten.joint if where == "joint" else rewritten.joint_tails).graph
    attack(graph)

    with pytest.raises(StructureError, match=rf"{where}: .*{problem}"):
        check(rewritten)


@pytest.mark.parametrize("where", [f"tail-{TASK}", "joint-tails"])
def test_tails_that_shuffle_the_experts_are_refused(where: str, rewritten: GraphSet, check: Check) -> None:
    graph = (rewritten.joint_tails if where == "joint-tails" else rewritten.tails[TASK]).graph
    features = graph.inputs[0]
    readers = tuple(features.uses())
    order = ir.Value(name="order", const_value=ir.tensor([1, 0, 2], name="order"))
    graph.register_initializer(order)
    shuffled = ir.Node("", "Gather", [features, order], [ir.AttrInt64("axis", 1)], name="shuffle")
    shuffled.outputs[0].shape = features.shape
    shuffled.outputs[0].type = features.type
    graph.insert_before(next(iter(graph)), shuffled)
    for reader in readers:
        reader.node.replace_input_with(reader.idx, shuffled.outputs[0])

    with pytest.raises(StructureError, match=f"{where}: slot 0 of the expert features"):
        check(rewritten)


def test_a_prediction_that_also_reads_another_gate_is_refused(rewritten: GraphSet, check: Check) -> None:
    """Nothing is lost, but something is there that was not captured."""
    graph = rewritten.joint.graph
    outputs = {value.name: value for value in graph.outputs}
    prediction, other = outputs["task_0.prediction"], outputs["task_2.prediction"]
    total = ir.Node("", "Add", [prediction, other], name="mixed")
    total.outputs[0].shape = prediction.shape
    total.outputs[0].type = prediction.type
    graph.append(total)
    position = list(graph.outputs).index(prediction)
    graph.outputs[position] = total.outputs[0]
    prediction.name, total.outputs[0].name = "before", "task_0.prediction"

    with pytest.raises(StructureError, match=r"joint: .*task_0"):
        check(rewritten)

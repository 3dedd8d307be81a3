"""The switch graph is the trunk and, behind a condition each, the tails; it shares their tensors and leaves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import te_export
from te_export.bundle.graph_file import linked_bytes, standalone_bytes
from te_export.bundle.weights_file import plan_weights
from te_export.errors import StructureError
from te_export.partition import GraphSet
from te_export.switch import MOST_TASKS, make_switch
from te_export.verify.switch_structure import check_switch

TASKS = ("task_0", "task_1", "task_2")
OUTPUTS = [f"{task}.{output}" for task in TASKS for output in ("prediction", "routing_weights")]


def made(graphs: GraphSet) -> ir.Model:
    switch = make_switch(graphs.trunk, graphs.tails)
    assert switch is not None
    return switch


def proved(switch: ir.Model, graphs: GraphSet) -> None:
    check_switch(switch.graph, graphs.trunk.graph, {task: tail.graph for task, tail in graphs.tails.items()})


def branch(switch: ir.Model, task: str, name: str = "then_branch") -> ir.Graph:
    (node,) = [node for node in switch.graph if node.op_type == "If" and node.name == task]
    return node.attributes[name].as_graph()


def session_of(data: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


def test_only_the_tasks_asked_for_are_computed_and_their_answers_are_those_of_their_tails(
    graphs: GraphSet,
) -> None:
    switch = session_of(standalone_bytes(made(graphs), "switch"))
    trunk = session_of(standalone_bytes(graphs.trunk, "trunk"))
    tails = {task: session_of(standalone_bytes(tail, task)) for task, tail in graphs.tails.items()}
    for rows in (1, 2, 7):
        x = np.random.default_rng(rows).standard_normal((rows, 20)).astype(np.float32)
        (features,) = trunk.run(None, {"x": x})
        for asked in ([True, True, True], [False, True, False], [True, False, True], [False] * 3):
            found = dict(zip(OUTPUTS, switch.run(OUTPUTS, {"x": x, "asked": np.array(asked)}), strict=True))
            for task, is_asked in zip(TASKS, asked, strict=True):
                expected = tails[task].run(None, {"expert_features": features})
                for output, value in zip(("prediction", "routing_weights"), expected, strict=True):
                    answer = found[f"{task}.{output}"]
                    if is_asked:
                        assert np.array_equal(answer, value)
                    else:
                        assert answer.shape == (0, *value.shape[1:])


def test_onnx_accepts_it(graphs: GraphSet) -> None:
    onnx.checker.check_model(onnx.load_from_string(standalone_bytes(made(graphs), "switch")), full_check=True)


def test_its_interface_is_that_of_the_joint_graph_and_the_choice(graphs: GraphSet) -> None:
    graph = made(graphs).graph

    assert [(value.name, value.dtype, list(value.shape or ())) for value in graph.inputs][1:] == [
        ("asked", ir.DataType.BOOL, [3])
    ]
    joint = graphs.joint.graph
    assert [(v.name, v.dtype, str(v.shape)) for v in graph.outputs] == [
        (v.name, v.dtype, str(v.shape)) for v in joint.outputs
    ]


def test_making_it_leaves_trunk_and_tails_as_they_were(graphs: GraphSet) -> None:
    def shown() -> list[bytes]:
        return [standalone_bytes(model, "graph") for model in (graphs.trunk, *graphs.tails.values())]

    before = shown()
    own = {node for model in graphs.models for node in model.graph}

    switch = made(graphs)

    assert shown() == before
    assert own.isdisjoint(switch.graph.all_nodes())


def test_making_it_twice_gives_the_same_bytes(graphs: GraphSet) -> None:
    assert standalone_bytes(made(graphs), "a") == standalone_bytes(made(graphs), "b")


def test_its_weights_are_the_tensors_of_the_other_graphs_at_the_top_level(graphs: GraphSet) -> None:
    """So weights.bin grows by nothing, and a session lets go of a weight that it has packed."""
    switch = made(graphs)
    others = [model.graph for model in graphs.models]

    assert plan_weights([*others, switch.graph]) == plan_weights(others)
    layout = plan_weights(others)
    for name, value in switch.graph.initializers.items():
        if name in layout.places:
            owners = [graph.initializers[name] for graph in others if name in graph.initializers]
            assert all(owner.const_value is value.const_value for owner in owners)
    assert all(not graph.initializers for graph in switch.graph.subgraphs())
    assert len(linked_bytes(switch, layout)) < 60_000


def test_a_bundle_grows_by_the_graph_file_alone(exported: te_export.ExportResult) -> None:
    (variant,) = exported.manifest.variants
    assert variant.switch is not None
    assert exported.manifest.file(variant.switch.path).size_bytes < 60_000
    weights = exported.manifest.file(variant.weights).size_bytes
    assert weights <= exported.manifest.model.parameter_bytes + 64 * 4096


@pytest.mark.parametrize("tasks", [0, 1, MOST_TASKS + 1])
def test_there_is_none_where_it_is_of_no_use(tasks: int, graphs: GraphSet) -> None:
    tails = {f"t{number}": graphs.tails["task_0"] for number in range(tasks)}

    assert make_switch(graphs.trunk, tails) is None


def test_constants_of_two_tails_under_one_name_are_shared_only_where_they_are_alike(graphs: GraphSet) -> None:
    """Tails are rewritten apart, so that one name may stand for two small tensors."""
    for number, tail in enumerate(graphs.tails.values()):
        graph = tail.graph
        node = next(iter(graph))
        shape = ir.Value(name="own.shape", const_value=ir.tensor(np.array([-1, 3, 8])))
        extra = ir.Value(name="own.number", const_value=ir.tensor(np.float32([number])))
        for value in (shape, extra):
            graph.register_initializer(value)
        (features,) = graph.inputs
        shaped = ir.Node("", "Reshape", [features, shape], name="own.reshape")
        added = ir.Node("", "Add", [shaped.outputs[0], extra], name="own.add")
        shaped.outputs[0].name, added.outputs[0].name = "own.cube", "own.sum"
        graph.insert_before(node, [shaped, added])
        for reader in [use.node for use in features.uses() if use.node is not shaped]:
            for place, value in enumerate(reader.inputs):
                if value is features:
                    reader.replace_input_with(place, added.outputs[0])

    switch = made(graphs)

    proved(switch, graphs)
    held = {name: value.const_value for name, value in switch.graph.initializers.items() if "own" in name}
    assert sorted(held) == ["own.number", "own.shape", "task_1/own.number", "task_2/own.number"]


def quantize(graph: ir.Graph) -> None:
    """One layer of a graph in the forms that other precisions take."""
    node = next(node for node in graph if node.op_type == "Gemm")
    weight = node.inputs[1]
    assert weight is not None
    scale = ir.Value(name=f"{weight.name}.scale", const_value=ir.tensor(np.float32(0.02)))
    assert weight.const_value is not None
    whole = weight.const_value.numpy().astype(np.int8)
    small = ir.Value(name=f"{weight.name}.int8", const_value=ir.tensor(whole))
    for value in (scale, small):
        graph.register_initializer(value)
    back = ir.Node("", "DequantizeLinear", [small, scale], name=f"{weight.name}.back")
    back.outputs[0].name = f"{weight.name}.float"
    graph.insert_before(node, back)
    node.replace_input_with(1, back.outputs[0])
    other = ir.Node("com.microsoft", "Anything", [node.inputs[0], small, scale], name=f"{node.name}.packed")
    other.outputs[0].name = f"{node.name}.packed.out"
    graph.insert_before(node, other)


def test_other_precisions_are_carried_over_whatever_their_operators_are(graphs: GraphSet) -> None:
    for model in (graphs.trunk, *graphs.tails.values()):
        quantize(model.graph)
    graphs.tails["task_2"].graph.opset_imports["com.microsoft"] = 1

    switch = made(graphs)

    proved(switch, graphs)
    assert switch.graph.opset_imports["com.microsoft"] == 1
    nodes = [node.op_type for node in switch.graph.all_nodes()]
    assert (nodes.count("DequantizeLinear"), nodes.count("Anything")) == (4, 4)


def take_the_name(graphs: GraphSet) -> None:
    next(iter(graphs.trunk.graph)).outputs[0].name = "asked"


def read_something_else(graphs: GraphSet) -> None:
    graphs.tails["task_1"].graph.inputs[0].name = "h"


def lose_an_output(graphs: GraphSet) -> None:
    graphs.tails["task_1"].graph.outputs.pop()


def hold_a_graph(graphs: GraphSet) -> None:
    node = next(iter(graphs.tails["task_1"].graph))
    node.attributes["body"] = ir.AttrGraph("body", ir.Graph([], [], nodes=[]))


def be_older(graphs: GraphSet) -> None:
    graphs.tails["task_1"].graph.opset_imports[""] = 18


def lose_a_shape(graphs: GraphSet) -> None:
    graphs.tails["task_1"].graph.outputs[0].shape = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (take_the_name, "switch: the trunk has a value 'asked' already"),
        (read_something_else, "switch: tail-task_1 is no tail"),
        (lose_an_output, "switch: tail-task_1 is no tail"),
        (hold_a_graph, "switch: tail-task_1 has nodes with graphs inside"),
        (be_older, "switch: tail-task_1 is of opset 18 of ai.onnx, others of"),
        (lose_a_shape, "has shape None, expected numbers after the batch axis"),
    ],
)
def test_what_cannot_be_put_behind_a_condition_is_refused(
    change: Callable[[GraphSet], None], message: str, graphs: GraphSet
) -> None:
    change(graphs)

    with pytest.raises(StructureError, match=message):
        make_switch(graphs.trunk, graphs.tails)


# The proof: whatever makes it another function is refused


def drop_a_node(switch: ir.Model) -> None:
    graph = branch(switch, "task_1")
    node = next(node for node in graph if node.op_type == "Relu")
    assert node.inputs[0] is not None
    node.outputs[0].replace_all_uses_with(node.inputs[0])


def change_an_attribute(switch: ir.Model) -> None:
    node = next(node for node in branch(switch, "task_1") if node.op_type == "Softmax")
    node.attributes["axis"] = ir.AttrInt64("axis", 0)


def change_the_trunk(switch: ir.Model) -> None:
    node = next(node for node in switch.graph if node.op_type == "Relu")
    assert node.inputs[0] is not None
    node.outputs[0].replace_all_uses_with(node.inputs[0])


def swap_the_gates_weights(switch: ir.Model) -> None:
    one, other = (switch.graph.initializers[f"gating_networks.{task}.gate.0.weight"] for task in (0, 1))
    one.const_value, other.const_value = other.const_value, one.const_value


def swap_an_experts_weights(switch: ir.Model) -> None:
    one, other = (switch.graph.initializers[f"experts.{number}.network.0.weight"] for number in (0, 1))
    one.const_value, other.const_value = other.const_value, one.const_value


def scale_a_weight(switch: ir.Model) -> None:
    value = switch.graph.initializers["gating_networks.2.gate.0.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.001))


def swap_conditions(switch: ir.Model) -> None:
    one, other = (node for node in switch.graph if node.op_type == "If" and node.name in ("task_0", "task_2"))
    first, second = one.inputs[0], other.inputs[0]
    one.replace_input_with(0, second)
    other.replace_input_with(0, first)


def swap_outputs(switch: ir.Model) -> None:
    first, second = switch.graph.outputs[0], switch.graph.outputs[4]
    switch.graph.outputs[0], switch.graph.outputs[4] = second, first
    first.name, second.name = second.name, first.name


def swap_a_tasks_outputs(switch: ir.Model) -> None:
    graph = branch(switch, "task_1")
    graph.outputs[0], graph.outputs[1] = graph.outputs[1], graph.outputs[0]


def always(switch: ir.Model) -> None:
    node = next(node for node in switch.graph if node.name == "task_1")
    value = ir.Value(name="yes", const_value=ir.tensor(np.array([True])))
    switch.graph.register_initializer(value)
    node.replace_input_with(0, value)


def compute_what_was_not_asked_for(switch: ir.Model) -> None:
    graph = branch(switch, "task_1", "else_branch")
    added = ir.Node("", "Identity", [graph.outputs[0]], name="more")
    added.outputs[0].name = "more"
    graph.append(added)


def answer_what_was_not_asked_for(switch: ir.Model) -> None:
    graph = branch(switch, "task_1", "else_branch")
    node = graph.outputs[0].producer()
    assert node is not None
    node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.zeros((1, 1), np.float32)))


def name_twice(switch: ir.Model) -> None:
    (features,) = [v for node in switch.graph for v in node.outputs if v.name == "expert_features"]
    next(iter(branch(switch, "task_1"))).outputs[0].name = features.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_a_node, r"switch: task_1: task_1/.* is not made as"),
        (change_an_attribute, r"switch: task_1: .* is not made as"),
        (change_the_trunk, r"is not made as .* is in trunk and tail"),
        (swap_the_gates_weights, r"switch: task_0: gating.* is not made as"),
        (swap_an_experts_weights, r"switch: task_0: experts.* is not made as"),
        (scale_a_weight, r"switch: task_2: gating.* is not made as"),
        (swap_conditions, "task_0 does not depend on element 0 of asked"),
        (swap_outputs, "task_0 is not behind one condition of its own"),
        (swap_a_tasks_outputs, r"switch: task_1: .* is not made as"),
        (always, "task_1 does not depend on element 1 of asked"),
        (compute_what_was_not_asked_for, "task_1 has 3 nodes where it was not asked for"),
        (answer_what_was_not_asked_for, "of task_1 is not a constant without rows"),
        (name_twice, "1 names stand for two values: expert_features"),
    ],
)
def test_a_switch_that_is_another_function_is_refused(
    change: Callable[[ir.Model], None], message: str, graphs: GraphSet
) -> None:
    switch = made(graphs)
    proved(switch, graphs)
    change(switch)

    with pytest.raises(StructureError, match=message):
        proved(switch, graphs)


def test_one_task_has_none_and_thirteen_have_none(
    make_model: Callable[..., object], tmp_path: Path, save_checkpoint: Callable[..., Path]
) -> None:
    for outputs in ((2,), (1,) * (MOST_TASKS + 1)):
        path = save_checkpoint(make_model(task_output_dims=outputs), f"{len(outputs)}.pt")
        result = te_export.export(path)
        assert result.manifest.variants[0].switch is None
        assert not (result.bundle / "fp32" / "switch.onnx").exists()

"""Where a trunk ends is what reachability and the rules for crossing values give, on graphs built by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from te_export.bundle.graph_file import standalone_bytes
from te_export.capture.joint_graph import JointGraph
from te_export.partition import GraphSet, partition
from te_export.shared_values import shared_values

WIDTH = 6
Axes = Sequence[int | str]


class Net:
    """A joint graph that is being built: float inputs (batch, 6), and tasks a, b, …, a linear layer each."""

    def __init__(self, inputs: Sequence[str] = ("x",)) -> None:
        self.rng = np.random.default_rng(0)
        values = [typed(ir.Value(name=name), ["batch", WIDTH]) for name in inputs]
        self.inputs = dict(zip(inputs, values, strict=True))
        self.graph = ir.Graph(values, [], nodes=[], opset_imports={"": 21}, name="joint")
        self.tasks: list[str] = []

    def add(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value],
        axes: Axes,
        dtype: ir.DataType = ir.DataType.FLOAT,
        **kept: int | Sequence[int],
    ) -> ir.Value:
        attributes = ir.convenience.convert_attributes(kept)
        node = ir.Node("", op_type, inputs, attributes=attributes, name=name)
        node.outputs[0].name = name
        self.graph.append(node)
        return typed(node.outputs[0], axes, dtype)

    def constant(self, name: str, values: object, dtype: type = np.float32) -> ir.Value:
        tensor = ir.tensor(np.asarray(values, dtype), name=name)
        value = ir.Value(name=name, const_value=tensor)
        value.shape, value.dtype = ir.Shape(tensor.shape), tensor.dtype
        self.graph.register_initializer(value)
        return value

    def linear(self, name: str, x: ir.Value, out: int = WIDTH) -> ir.Value:
        assert x.shape is not None
        weight = self.constant(f"{name}.weight", self.rng.standard_normal((x.shape[1], out)))
        return self.add(name, "MatMul", [x, weight], ["batch", out])

    def relu(self, name: str, x: ir.Value) -> ir.Value:
        assert x.shape is not None
        return self.add(name, "Relu", [x], list(x.shape))

    def put_out(self, task: str, prediction: ir.Value, weights: ir.Value | None = None) -> None:
        self.tasks.append(task)
        prediction.name = f"{task}.prediction"
        self.graph.outputs.append(prediction)
        if weights is not None:
            weights.name = f"{task}.routing_weights"
            self.graph.outputs.append(weights)

    def captured(self) -> JointGraph:
        return JointGraph(model=ir.Model(self.graph, ir_version=10), tasks=tuple(self.tasks), opset=21)

    def shared(self) -> list[str]:
        """The shared values; the graph is checked first, so that no test is about one that cannot be."""
        whole = self.captured()
        onnx.checker.check_model(
            onnx.load_from_string(standalone_bytes(whole.model, "joint")), full_check=True
        )
        return shared_values(whole)


def typed(value: ir.Value, axes: Axes, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    value.shape, value.type = ir.Shape(axes), ir.TensorType(dtype)
    return value


def names(values: Sequence[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def nodes(model: ir.Model | None) -> set[str]:
    assert model is not None
    return {str(node.name) for node in model.graph}


def mmoe(inputs: Sequence[str] = ("x",)) -> Net:
    """Two experts over the joined inputs; each task's gate reads the first input itself."""
    net = Net(inputs)
    x = net.inputs[inputs[0]]
    joined = x
    if len(inputs) > 1:
        joined = net.add(
            "joined", "Concat", list(net.inputs.values()), ["batch", WIDTH * len(inputs)], axis=1
        )
    experts = [net.relu(f"expert_{k}", net.linear(f"expert_{k}.layer", joined)) for k in range(2)]
    for task in "ab":
        gate = net.add(f"{task}.gate", "Softmax", [net.linear(f"{task}.logits", x, 2)], ["batch", 2], axis=-1)
        mixed = None
        for k, expert in enumerate(experts):
            start, stop = (net.constant(f"{task}.{k}.{end}", [end], np.int64) for end in (k, k + 1))
            axis = net.constant(f"{task}.{k}.axis", [1], np.int64)
            weight = net.add(f"{task}.weight_{k}", "Slice", [gate, start, stop, axis], ["batch", 1])
            part = net.add(f"{task}.part_{k}", "Mul", [weight, expert], ["batch", WIDTH])
            mixed = part if mixed is None else net.add(f"{task}.mix", "Add", [mixed, part], ["batch", WIDTH])
        assert mixed is not None
        net.put_out(task, net.linear(f"{task}.head", mixed, 1), gate)
    return net


def answers(graphs: GraphSet, feeds: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], ...]:
    """By name in the joint graph: what joint graph, task graphs, trunk with tails, and trunk with joint tails answer."""

    def run(model: ir.Model, values: dict[str, np.ndarray], prefix: str = "") -> dict[str, np.ndarray]:
        session = ReferenceEvaluator(onnx.load_from_string(standalone_bytes(model, "any of them")))
        outputs = session.run(None, {name: values[name] for name in names(model.graph.inputs)})
        return {
            prefix + name: output for name, output in zip(names(model.graph.outputs), outputs, strict=True)
        }

    def each(models: dict[str, ir.Model], values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for task, model in models.items():
            found |= run(model, values, f"{task}.")
        return found

    assert graphs.trunk is not None
    made = run(graphs.trunk, feeds)
    assert graphs.joint_tails is not None
    apart, together = each(graphs.tails, feeds | made), run(graphs.joint_tails, feeds | made)
    return run(graphs.joint, feeds), each(graphs.tasks, feeds), apart, together


@pytest.mark.parametrize("inputs", [("x",), ("x", "z")])
def test_where_gates_read_the_input_the_trunk_ends_at_the_experts(inputs: tuple[str, ...]) -> None:
    net = mmoe(inputs)
    assert net.shared() == ["expert_0", "expert_1"]

    graphs = partition(net.captured())

    assert graphs.trunk is not None
    assert names(graphs.trunk.graph.inputs) == list(inputs)
    assert names(graphs.trunk.graph.outputs) == ["expert_0", "expert_1"]
    for task in "ab":
        tail = graphs.tails[task].graph
        assert set(names(tail.inputs)) == {"expert_0", "expert_1", "x"}  # the gates read no other input
        assert names(tail.outputs) == ["prediction", "routing_weights"]
        assert {name[0] for name in nodes(graphs.tails[task])} == {task}
        assert not nodes(graphs.tails[task]) & nodes(graphs.trunk)
    rng = np.random.default_rng(1)
    feeds = {name: rng.standard_normal((3, WIDTH), dtype=np.float32) for name in inputs}
    joint, *others = answers(graphs, feeds)
    assert list(joint) == ["a.prediction", "a.routing_weights", "b.prediction", "b.routing_weights"]
    for found in others:
        assert joint.keys() == found.keys()
        for name, values in joint.items():
            np.testing.assert_array_equal(found[name], values)


def test_a_shared_bottom_crosses_at_its_last_layer() -> None:
    net = Net()
    bottom = net.relu("bottom", net.linear("layer", net.inputs["x"]))
    for task in "abc":
        net.put_out(task, net.linear(f"{task}.head", bottom, 1))

    assert net.shared() == ["bottom"]
    graphs = partition(net.captured())
    assert nodes(graphs.trunk) == {"layer", "bottom"}
    assert [names(graphs.tails[task].graph.inputs) for task in "abc"] == [["bottom"]] * 3


def test_what_only_some_tasks_share_stays_in_their_tails() -> None:
    net = Net()
    bottom = net.relu("bottom", net.linear("layer", net.inputs["x"]))
    some = net.relu("some", net.linear("some.layer", bottom))
    for task, below in (("a", some), ("b", some), ("c", bottom)):
        net.put_out(task, net.linear(f"{task}.head", below, 1))

    assert net.shared() == ["bottom"]
    graphs = partition(net.captured())
    assert nodes(graphs.trunk) == {"layer", "bottom"}
    for task in "ab":
        assert nodes(graphs.tails[task]) == {"some.layer", "some", f"{task}.head"}
    assert nodes(graphs.tails["c"]) == {"c.head"}


def test_tasks_that_share_no_layer_have_no_trunk() -> None:
    net = Net()
    for task in "ab":
        net.put_out(task, net.linear(f"{task}.head", net.inputs["x"], 1))

    assert net.shared() == []
    graphs = partition(net.captured())
    assert graphs.trunk is None
    assert graphs.tails == {}
    assert graphs.joint_tails is None
    assert len(graphs.models) == 3
    assert [names(graphs.tasks[task].graph.inputs) for task in "ab"] == [["x"], ["x"]]


def test_shared_nodes_without_weights_are_no_trunk() -> None:
    net = Net()
    flat = net.add(
        "flat", "Reshape", [net.inputs["x"], net.constant("shape", [-1, WIDTH], np.int64)], ["batch", WIDTH]
    )
    for task in "ab":
        net.put_out(task, net.linear(f"{task}.head", net.relu(f"{task}.relu", flat), 1))

    assert net.shared() == []


def test_one_task_has_no_trunk() -> None:
    net = Net()
    net.put_out("only", net.linear("head", net.relu("bottom", net.linear("layer", net.inputs["x"])), 1))

    assert net.shared() == []
    graphs = partition(net.captured())
    assert (graphs.trunk, graphs.tails) == (None, {})


def test_a_value_whose_first_axis_is_not_the_batch_does_not_cross() -> None:
    """Experts on the first axis: the tails turn again what the trunk gives before."""
    net = Net()
    layer = net.linear("layer", net.inputs["x"])
    turned = net.add("turned", "Transpose", [layer], [WIDTH, "batch"], perm=[1, 0])
    for task in "ab":
        back = net.add(f"{task}.back", "Transpose", [turned], ["batch", WIDTH], perm=[1, 0])
        net.put_out(task, net.linear(f"{task}.head", back, 1))

    assert net.shared() == ["layer"]
    graphs = partition(net.captured())
    assert nodes(graphs.trunk) == {"layer"}
    assert nodes(graphs.tails["a"]) == {"turned", "a.back", "a.head"}


@pytest.mark.parametrize("axes", [["batch", "length"], ["rows", WIDTH], [2, WIDTH], None])
def test_a_value_of_another_open_axis_or_a_fixed_batch_or_of_unknown_shape_does_not_cross(
    axes: Axes | None,
) -> None:
    net = Net()
    last = net.relu("last", net.linear("layer", net.inputs["x"]))
    for task in "ab":
        net.put_out(task, net.linear(f"{task}.head", last, 1))
    last.shape = None if axes is None else ir.Shape(axes)

    assert shared_values(net.captured()) == ["layer"]


@pytest.mark.parametrize(
    "dtype", [ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.FLOAT16]
)
def test_integers_bools_and_halves_do_not_cross(dtype: ir.DataType) -> None:
    net = Net()
    layer = net.linear("layer", net.inputs["x"])
    cast = net.add("cast", "Cast", [layer], ["batch", WIDTH], dtype, to=int(dtype))
    for task in "ab":
        back = net.add(f"{task}.back", "Cast", [cast], ["batch", WIDTH], to=int(ir.DataType.FLOAT))
        net.put_out(task, net.linear(f"{task}.head", back, 1))

    assert net.shared() == ["layer"]
    graphs = partition(net.captured())
    assert nodes(graphs.tails["b"]) == {"cast", "b.back", "b.head"}


def test_a_count_taken_from_a_shape_is_taken_again_by_each_tail() -> None:
    """It may not cross, and neither then may it hold back what it was taken from."""
    net = Net()
    layer = net.linear("layer", net.inputs["x"])
    rows = net.add("rows", "Shape", [layer], [1], ir.DataType.INT64, start=0, end=1)
    rest = net.constant("rest", [WIDTH], np.int64)
    for task in "ab":
        shape = net.add(f"{task}.shape", "Concat", [rows, rest], [2], ir.DataType.INT64, axis=0)
        kept = net.add(f"{task}.kept", "Reshape", [layer, shape], ["batch", WIDTH])
        net.put_out(task, net.linear(f"{task}.head", kept, 1))

    assert net.shared() == ["layer"]
    assert nodes(partition(net.captured()).tails["a"]) == {"rows", "a.shape", "a.kept", "a.head"}


def test_what_weights_alone_give_does_not_cross() -> None:
    """A weight that every task turns: it holds no row, and each tail makes it for itself."""
    net = Net()
    bottom = net.relu("bottom", net.linear("layer", net.inputs["x"]))
    turned = net.add("turned", "Transpose", [net.constant("w", np.ones((4, WIDTH)))], [WIDTH, 4], perm=[1, 0])
    for task in "ab":
        shared = net.add(f"{task}.all", "MatMul", [bottom, turned], ["batch", 4])
        net.put_out(task, net.linear(f"{task}.head", shared, 1))

    assert net.shared() == ["bottom"]
    assert "turned" in nodes(partition(net.captured()).tails["a"])


def test_layers_that_may_not_cross_anywhere_leave_no_trunk() -> None:
    net = Net()
    turned = net.add("turned", "Transpose", [net.inputs["x"]], [WIDTH, "batch"], perm=[1, 0])
    weight = net.constant("w", np.ones((WIDTH, WIDTH)))
    layer = net.add("layer", "MatMul", [weight, turned], [WIDTH, "batch"])
    for task in "ab":
        back = net.add(f"{task}.back", "Transpose", [layer], ["batch", WIDTH], perm=[1, 0])
        net.put_out(task, net.linear(f"{task}.head", back, 1))

    assert net.shared() == []


def test_a_graph_output_does_not_cross() -> None:
    """A prediction that another task reads on keeps its name, so both tails make it."""
    net = Net()
    bottom = net.relu("bottom", net.linear("layer", net.inputs["x"]))
    first = net.linear("first", bottom, 2)
    net.put_out("a", first)
    net.put_out("b", net.linear("second", first, 1))

    assert net.shared() == ["bottom"]
    graphs = partition(net.captured())
    assert nodes(graphs.trunk) == {"layer", "bottom"}
    assert (nodes(graphs.tails["a"]), nodes(graphs.tails["b"])) == ({"first"}, {"first", "second"})
    assert names(graphs.tails["b"].graph.outputs) == ["prediction"]


def test_another_layout_of_a_shared_value_is_left_to_the_tails() -> None:
    net = Net()
    shared = net.relu("shared", net.linear("layer", net.inputs["x"]))
    size = net.constant("size", [-1, 2, 3], np.int64)
    cube = net.add("cube", "Reshape", [shared, size], ["batch", 2, 3])
    for task in "ab":
        mean = net.add(f"{task}.mean", "ReduceMean", [cube], ["batch", 1, 3], keepdims=1)
        total = net.add(f"{task}.sum", "ReduceSum", [shared], ["batch", 1], keepdims=1)
        flat = net.add(
            f"{task}.flat",
            "Add",
            [net.add(f"{task}.lie", "Flatten", [mean], ["batch", 3]), total],
            ["batch", 3],
        )
        net.put_out(task, flat)

    assert shared_values(net.captured()) == ["shared"]

"""A captured graph keeps every parameter under its own name, has one symbolic batch axis, and no trace of the
machine it was captured on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import te_export
from te_export.bundle.graph_file import standalone_bytes
from te_export.capture.joint_graph import EXPERT_FEATURES, JointGraph
from te_export.capture.opset import newest_opset
from te_export.capture.tidy import tidy
from te_export.capture.torch_capture import capture
from te_export.errors import CaptureError
from te_export.models.exportable import ExportableModel
from te_export.models.task_expert import TaskExpertModel
from te_export.partition import partition

MakeModel = Callable[..., TaskExpertModel]
Load = Callable[..., ExportableModel]


@pytest.fixture(scope="module")
def twins(make_model: MakeModel, load: Load) -> tuple[ExportableModel, JointGraph]:
    """A model with an all-zero bias, two experts that are equal, and one tensor used under two names."""
    state = {name: tensor.clone() for name, tensor in make_model().state_dict().items()}
    for name in [name for name in state if name.startswith("experts.1.")]:
        state[name] = state[name.replace("experts.1.", "experts.0.")].clone()
    state["task_heads.2.head.0.weight"] = state["task_heads.0.head.0.weight"]
    state["backbone.network.3.bias"].zero_()
    state["experts.2.network.0.weight"].zero_()
    model = load(state)
    return model, capture(model, newest_opset())


def floats(graph: ir.Graph) -> dict[str, np.ndarray]:
    return {
        name: value.const_value.numpy()
        for name, value in graph.initializers.items()
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT
    }


def test_zero_equal_and_shared_tensors_all_stay_apart(twins: tuple[ExportableModel, JointGraph]) -> None:
    model, joint = twins
    held = model.module.state_dict()

    found = floats(joint.model.graph)

    assert found.keys() == model.used_parameters
    for name, values in found.items():
        assert np.array_equal(values, held[f"model.{name}"].numpy())


def test_equal_tensors_are_read_by_nodes_of_their_own(twins: tuple[ExportableModel, JointGraph]) -> None:
    graph = twins[1].model.graph
    first, second = (graph.initializers[f"experts.{i}.network.3.weight"] for i in (0, 1))

    assert {node.name for node, _ in first.uses()} == {"experts.0.network.3"}
    assert {node.name for node, _ in second.uses()} == {"experts.1.network.3"}


def test_weights_share_the_memory_of_the_torch_parameters(
    twins: tuple[ExportableModel, JointGraph],
) -> None:
    model, joint = twins
    name = "backbone.network.3.weight"

    held = model.module.state_dict()[f"model.{name}"]
    value = joint.model.graph.initializers[name].const_value

    assert value is not None
    assert value.numpy().ctypes.data == held.data_ptr()


def test_every_input_and_output_has_the_batch_axis_by_name(captured: JointGraph) -> None:
    graph = captured.model.graph

    assert [(value.name, str(value.shape)) for value in graph.inputs] == [("x", "[batch,20]")]
    shapes = {value.name: str(value.shape) for value in graph.outputs}
    assert shapes[EXPERT_FEATURES] == "[batch,3,8]"
    assert shapes["task_1.prediction"] == "[batch,1]"
    assert shapes["task_1.routing_weights"] == "[batch,3]"
    assert list(shapes) == [
        EXPERT_FEATURES,
        *(f"task_{t}.{output}" for t in range(3) for output in ("prediction", "routing_weights")),
    ]


def test_values_in_between_have_known_shapes_too(captured: JointGraph) -> None:
    shapes = {str(v.name): v.shape for node in captured.model.graph for v in node.outputs}

    assert [name for name, shape in shapes.items() if shape is None] == []


def test_the_trunk_is_there_once_for_all_tasks(captured: JointGraph) -> None:
    gemms = [node.name for node in captured.model.graph if node.op_type == "Gemm"]

    assert sorted(gemms) == sorted(
        [f"backbone.network.{layer}" for layer in (0, 3, 6)]
        + [f"experts.{i}.network.{layer}" for i in range(3) for layer in (0, 3, 6)]
        + [f"gating_networks.{t}.gate.{layer}" for t in range(3) for layer in (0, 2)]
        + [f"task_heads.{t}.head.{layer}" for t in range(3) for layer in (0, 3)]
    )


def test_nodes_have_names_of_their_own(captured: JointGraph) -> None:
    names = [node.name for node in captured.model.graph]

    assert len(set(names)) == len(names)


def test_nothing_in_the_files_tells_where_they_were_made(exported: te_export.ExportResult) -> None:
    telltale = {
        str(Path(te_export.__file__).parent.parent),
        str(Path(torch.__file__).parent.parent),
        str(exported.bundle.parent),
        str(Path.home()),
        "/work",
        "site-packages",
        ".py",
        "Traceback",
        'File "',
    } - {"/"}
    paths = [path for path in exported.bundle.rglob("*") if path.is_file()]

    assert len(paths) > 12
    for path in paths:
        data = path.read_bytes()
        assert [text for text in telltale if text.encode() in data] == [], path.name


def test_graphs_carry_no_metadata_and_no_doc_strings(own_capture: JointGraph) -> None:
    set_of_graphs = partition(own_capture)

    for model in (set_of_graphs.joint, *set_of_graphs.tasks.values(), *set_of_graphs.tails.values()):
        proto = ir.to_proto(model)
        parts = [proto, proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output]
        parts += [*proto.graph.value_info, *proto.graph.initializer]
        assert [part for part in parts if part.metadata_props or part.doc_string] == []
        assert proto.producer_name == "te-export"
        assert (proto.producer_version, proto.domain, proto.model_version) == ("", "", 0)
        assert len(proto.functions) == 0


def test_capturing_twice_gives_the_same_bytes(exportable: ExportableModel, captured: JointGraph) -> None:
    again = capture(exportable, newest_opset())

    assert standalone_bytes(again.model, "joint") == standalone_bytes(captured.model, "joint")


class BakesBatch(nn.Module):
    """A module whose forward turns the batch size into a Python number."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = int(x.shape[0])
        return tuple(value + torch.ones(2, 1)[:rows, 0].sum() * 0 for value in self.inner(x.reshape(2, -1)))


def test_a_module_that_bakes_the_batch_size_is_refused(exportable: ExportableModel) -> None:
    baked = ExportableModel(**{**vars(exportable), "module": BakesBatch(exportable.module).eval()})

    with pytest.raises(CaptureError, match="batch"):
        capture(baked, newest_opset())


def hand_made(
    input_shape: list[int | str] | None, output_shape: list[int | str] | None, outputs: int = 1
) -> ir.Model:
    """x → Relu → y, with the shapes given."""
    x = ir.Value(
        name="x",
        shape=None if input_shape is None else ir.Shape(input_shape),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    nodes = [ir.Node("", "Relu", [x], name=f"node{i}") for i in range(outputs)]
    for node in nodes:
        node.outputs[0].shape = None if output_shape is None else ir.Shape(output_shape)
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x], [node.outputs[0] for node in nodes], nodes=nodes, opset_imports={"": 18}, name="hand"
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("input_shape", "output_shape", "problem"),
    [
        ([2, 3], [2, 3], "batch axis of input 'x' came out static"),
        ([], [], "batch axis of input 'x' came out static"),
        (None, None, "batch axis of input 'x' came out static"),
    ],
)
def test_a_static_batch_axis_is_refused(
    input_shape: list[int | str] | None, output_shape: list[int | str] | None, problem: str
) -> None:
    model = hand_made(input_shape, output_shape)

    with pytest.raises(CaptureError, match=problem):
        tidy(model, parameter_prefix="model.", inputs=["x"], outputs=["y"], opset=18)


def test_a_static_batch_axis_of_an_output_is_refused() -> None:
    model = hand_made(["batch", 3], ["batch", 3])
    (node,) = model.graph
    fixed = ir.Value(name="shape", const_value=ir.tensor(np.array([2, 3])))
    reshape = ir.Node("", "Reshape", [node.outputs[0], fixed], name="bakes")
    reshape.outputs[0].shape = ir.Shape([2, 3])
    reshape.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.register_initializer(fixed)
    model.graph.append(reshape)
    model.graph.outputs[0] = reshape.outputs[0]

    with pytest.raises(CaptureError, match=r"batch axis of output 'y' came out static \(\[2,3\]\)"):
        tidy(model, parameter_prefix="model.", inputs=["x"], outputs=["y"], opset=18)


def test_inputs_and_outputs_with_different_batch_axes_are_refused() -> None:
    model = hand_made(["rows", 3], ["rows", 3])
    extra = ir.Value(name="z", shape=ir.Shape(["others", 3]), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.append(extra)

    with pytest.raises(CaptureError, match="do not share one batch axis: found others, rows"):
        tidy(model, parameter_prefix="model.", inputs=["x", "z"], outputs=["y"], opset=18)


def test_another_number_of_inputs_is_refused() -> None:
    with pytest.raises(CaptureError, match="the capture has 1 inputs, expected 2: x, z"):
        tidy(
            hand_made(["b", 3], ["b", 3]),
            parameter_prefix="model.",
            inputs=["x", "z"],
            outputs=["y"],
            opset=18,
        )


def test_inputs_get_their_names_and_values_in_between_others() -> None:
    model = hand_made(["b", 3], ["b", 3])
    model.graph.inputs[0].name = "args_0"
    model.graph.outputs[0].name = "x"

    tidy(model, parameter_prefix="model.", inputs=["x"], outputs=["y"], opset=18)

    assert [value.name for value in model.graph.inputs] == ["x"]
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_the_batch_axis_gets_its_name_whatever_the_capture_called_it() -> None:
    model = tidy(
        hand_made(["s77", 3], ["s77", 3]), parameter_prefix="model.", inputs=["x"], outputs=["y"], opset=18
    )

    assert [str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)] == ["[batch,3]"] * 2


@pytest.mark.parametrize(
    ("captured", "named"),
    [
        ("20*s77", "[20*batch,3]"),
        ("s77*20", "None"),
        ("20*s7", "None"),
        ("s77 + 1", "None"),
        ("20*s77*2", "None"),
    ],
)
def test_places_laid_out_as_rows_are_told_in_the_batch(captured: str, named: str) -> None:
    model = hand_made(["s77", 3], ["s77", 3])
    (node,) = model.graph
    rows = ir.Node("", "Abs", [node.outputs[0]], name="rows")
    rows.outputs[0].shape = ir.Shape([captured, 3])
    rows.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    back = ir.Node("", "Neg", [rows.outputs[0]], name="back")
    back.outputs[0].shape, back.outputs[0].type = ir.Shape(["s77", 3]), ir.TensorType(ir.DataType.FLOAT)
    model.graph.extend([rows, back])
    model.graph.outputs[0] = back.outputs[0]

    tidy(model, parameter_prefix="model.", inputs=["x"], outputs=["y"], opset=18)

    (shape,) = (value.outputs[0].shape for value in model.graph if value.op_type == "Abs")
    assert str(shape) == named


MARK = "a-folder-of-the-machine"


@pytest.mark.parametrize("part", ["graph", "node", "value"])
def test_traces_of_the_capture_are_cleared_from(part: str) -> None:
    model = hand_made(["b", 3], ["b", 3])
    (node,) = model.graph
    marked = {"graph": model.graph, "node": node, "value": node.outputs[0]}[part]
    marked.metadata_props["pkg.torch.onnx.stack_trace"] = f'File "{MARK}/train.py", line 3, in forward'
    marked.doc_string = f"captured in {MARK}"

    tidy(model, parameter_prefix="model.", inputs=["x"], outputs=["y"], opset=18)

    assert MARK.encode() not in ir.to_proto(model).SerializeToString()


@pytest.mark.parametrize("outputs", [[], ["a", "b"]])
def test_another_number_of_outputs_is_refused(outputs: list[str]) -> None:
    with pytest.raises(CaptureError, match=f"the capture has 1 outputs, expected {len(outputs)}"):
        tidy(
            hand_made(["b", 3], ["b", 3]), parameter_prefix="model.", inputs=["x"], outputs=outputs, opset=18
        )


def test_an_initializer_without_a_value_is_refused() -> None:
    model = hand_made(["b", 3], ["b", 3])
    empty = ir.Value(name="model.w", const_value=ir.tensor(np.zeros(3, np.float32)))
    model.graph.register_initializer(empty)
    empty.const_value = None

    with pytest.raises(CaptureError, match=r"initializer 'model\.w' has no value"):
        tidy(model, parameter_prefix="model.", inputs=["x"], outputs=["y"], opset=18)


def test_an_opset_that_the_converter_cannot_reach_is_refused() -> None:
    with pytest.raises(CaptureError, match="could not be converted to opset 9999"):
        tidy(
            hand_made(["b", 3], ["b", 3]), parameter_prefix="model.", inputs=["x"], outputs=["y"], opset=9999
        )


@pytest.mark.parametrize("reads", ["outside", "its own"])
def test_a_branch_that_reads_from_around_it_is_refused(reads: str) -> None:
    body = "t = Neg (x)" if reads == "outside" else "t = Constant <value = float[1] {1.0}> ()"
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[s, 4] x, bool flag) => (float[s, 4] y) {{
            h = If (flag) <then_branch = one () => (t) {{ {body} }},
                           else_branch = other () => (e) {{ e = Constant <value = float[1] {{2.0}}> () }}>
            y = Add (x, h)
        }}"""
    )
    model.graph.inputs.pop()
    model.graph.register_initializer(
        ir.Value(name="module.flag", const_value=ir.tensor(np.array(True), name="module.flag"))
    )
    next(node for node in model.graph if node.op_type == "If").replace_input_with(
        0, model.graph.initializers["module.flag"]
    )

    def cleaned() -> ir.Model:
        return tidy(model, parameter_prefix="module.", inputs=["x"], outputs=["p"], opset=18)

    if reads == "outside":
        with pytest.raises(CaptureError, match=r"as ONNX's If, whose body .* take torch\.cond"):
            cleaned()
    else:
        assert "If" in {node.op_type for node in cleaned().graph}

"""The form without data: its layers, its numbers, and rows that do not depend on one another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import pytest

from te_export.bundle.weights_file import plan_weights
from te_export.partition import GraphSet
from te_export.precision.block_weights import BlockWeights
from te_export.precision.integer_weights import CONTRIB_DOMAIN
from te_export.precision.layers import linear_layers, weight_names
from te_export.precision.trial import open_trial

MakeGraphs = Callable[..., GraphSet]
Answers = dict[str, np.ndarray]
X = np.random.default_rng(3).standard_normal((40, 96)).astype(np.float32)


def run(model: ir.Model, folder: Path, x: np.ndarray = X) -> Answers:
    session = open_trial(model, folder)
    return dict(zip((spec.name for spec in session.spec.outputs), session.run({"x": x}), strict=True))


def converted(model: ir.Model, form: BlockWeights, kept: frozenset[str] = frozenset()) -> ir.Model:
    copy = model.clone()
    assert form.convert(copy, kept)
    return copy


def spread_error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - exact) ** 2)) / exact.std())


@pytest.mark.parametrize("bits", [8, 4])
def test_one_layer_is_off_by_its_roundings_and_no_more(tmp_path: Path, bits: Literal[8, 4]) -> None:
    """Half a step for every weight and every activation, each times the other factor, summed over a row."""
    rng = np.random.default_rng(1)
    weight, bias = (
        rng.standard_normal((256, 96)).astype(np.float32),
        rng.standard_normal(256).astype(np.float32),
    )
    x = ir.Value(name="x", shape=ir.Shape(["batch", 96]), type=ir.TensorType(ir.DataType.FLOAT))
    constants = [
        ir.Value(name=name, const_value=ir.tensor(values, name=name))
        for name, values in (("weight", weight), ("bias", bias))
    ]
    attributes = ir.convenience.convert_attributes({"transB": 1})
    node = ir.Node("", "Gemm", [x, *constants], attributes=attributes, name="layer")
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["batch", 256]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": 21}, name="layer")
    for constant in constants:
        graph.register_initializer(constant)

    found = run(converted(ir.Model(graph, ir_version=10), BlockWeights(bits)), tmp_path)["y"]

    step_w = np.abs(weight).max(axis=1)[None, :] / (127 if bits == 8 else 7)
    step_x = np.abs(X).max(axis=1)[:, None] / 127
    by_weights = np.abs(X).sum(axis=1)[:, None] * step_w / 2
    by_inputs = step_x / 2 * (np.abs(weight).sum(axis=1)[None, :] + weight.shape[1] * step_w / 2)
    error = np.abs(found - (X.astype(np.float64) @ weight.T + bias))
    assert (error <= by_weights + by_inputs).all()
    assert error.max() > 0


@pytest.mark.parametrize("level", ["none", "exact"])
def test_8_bits_are_off_about_a_sixteenth_of_what_4_are(
    wide_graphs: MakeGraphs, tmp_path: Path, level: str
) -> None:
    joint = wide_graphs(level).joint
    exact = run(joint, tmp_path)
    eight, four = (run(converted(joint, BlockWeights(bits)), tmp_path) for bits in (8, 4))

    assert list(eight) == list(four) == list(exact)
    for name, values in exact.items():
        ratio = spread_error(four[name], values) / spread_error(eight[name], values)
        assert 4 < ratio < 64, name


def test_every_large_layer_is_converted_and_no_other(wide_graphs: MakeGraphs) -> None:
    joint = wide_graphs().joint
    large = [linear.name for linear in linear_layers(joint.graph)]
    small = sum(node.op_type == "Gemm" for node in joint.graph) - len(large)

    model = converted(joint, BlockWeights(8))

    operators = Counter(node.op_type for node in model.graph)
    assert operators["MatMulNBits"] == len(large) > 3
    assert operators["Gemm"] == small > 0
    assert model.opset_imports[CONTRIB_DOMAIN] == 1


def test_the_original_stays_as_it_is(wide_graphs: MakeGraphs) -> None:
    joint = wide_graphs().joint
    before = [(node.op_type, node.name) for node in joint.graph], list(joint.graph.initializers)

    converted(joint, BlockWeights(8))

    assert ([(node.op_type, node.name) for node in joint.graph], list(joint.graph.initializers)) == before


@pytest.mark.parametrize("bits", [8, 4])
def test_task_graphs_give_what_the_joint_graph_gives(
    wide_graphs: MakeGraphs, tmp_path: Path, bits: Literal[8, 4]
) -> None:
    graphs, form = wide_graphs(), BlockWeights(bits)
    joint = run(converted(graphs.joint, form), tmp_path)

    for task, model in graphs.tasks.items():
        found = run(converted(model, form), tmp_path)
        np.testing.assert_allclose(found["prediction"], joint[f"{task}.prediction"], rtol=1e-5, atol=1e-5)


def test_weights_are_stored_once_for_all_graphs(wide_graphs: MakeGraphs) -> None:
    graphs, form = wide_graphs(), BlockWeights(8)
    joint = converted(graphs.joint, form)
    rest = [converted(model, form).graph for model in graphs.models[1:]]

    together = plan_weights([joint.graph, *rest]).size_bytes

    assert together <= 1.01 * plan_weights([joint.graph]).size_bytes
    assert together < 0.4 * plan_weights([graphs.joint.graph]).size_bytes


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_its_neighbours(
    wide_graphs: MakeGraphs, tmp_path: Path, bits: Literal[8, 4]
) -> None:
    model = converted(wide_graphs().joint, BlockWeights(bits))
    disturbed = X.copy()
    disturbed[7] *= 100

    calm, loud = run(model, tmp_path), run(model, tmp_path, disturbed)

    for name, values in calm.items():
        others = np.arange(len(X)) != 7
        np.testing.assert_array_equal(values[others], loud[name][others], err_msg=name)


@pytest.mark.parametrize(("bits", "held_as"), [(8, "Gemm"), (4, "8")])
def test_kept_layers_are_held_more_exactly(
    wide_graphs: MakeGraphs, bits: Literal[8, 4], held_as: str
) -> None:
    joint = wide_graphs().joint
    first = next(iter(linear_layers(joint.graph)))
    form = BlockWeights(bits)

    model = converted(joint, form, frozenset(weight_names(first)[:1]))

    (node,) = [node for node in model.graph if str(node.name).startswith(first.name)]
    assert held_as in (node.op_type, str(node.attributes["bits"].value) if "bits" in node.attributes else "")
    assert form.kept_as == ("float32" if bits == 8 else "8 bits")


def test_nothing_large_enough_converts_nothing(graphs: GraphSet) -> None:
    before = [node.op_type for node in graphs.joint.graph]

    assert BlockWeights(8).convert(graphs.joint, frozenset()) == ()

    assert [node.op_type for node in graphs.joint.graph] == before
    assert CONTRIB_DOMAIN not in graphs.joint.opset_imports

"""Static int8: structure, numbers, and that every graph of a variant gives the same ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from te_export.bundle.weights_file import plan_weights
from te_export.capture.opset import newest_opset
from te_export.partition import GraphSet
from te_export.precision.layers import linear_layers, weight_names
from te_export.precision.static.activation_ranges import ActivationRanges, measure_ranges
from te_export.precision.static.static_int8 import StaticInt8, count_int8_convolutions
from te_export.rewrite.stack_linears import stack_linears

Arrays = dict[str, NDArray[np.float32]]
Convert = Callable[..., tuple[ir.Model, tuple[str, ...]]]
Variant = tuple[GraphSet, ActivationRanges, NDArray[np.float32]]
ROWS = np.random.default_rng(1).standard_normal((200, 64)).astype(np.float32)
NONE: frozenset[str] = frozenset()


def net(body: str, *, opset: int = 21, outputs: str = "float[batch, n] y", **sizes: Any) -> ir.Model:
    """x (batch, 64) → outputs. A size is the shape of a seeded weight, or the values of an int64 constant."""
    header = f'<ir_version: 10, opset_import: ["": {opset}]> net (float[batch, 64] x) => ({outputs})'
    proto = onnx.parser.parse_model(f"{header} {{ {body} }}")
    rng = np.random.default_rng(0)
    for name, size in sizes.items():
        if isinstance(size, list):
            values: NDArray[Any] = np.asarray(size, np.int64)
        elif isinstance(size, np.ndarray):
            values = size
        else:
            values = (rng.standard_normal(size) / np.sqrt(size[-1])).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{index}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def mixture(
    *, opset: int = 21, count: int = 3, activation: str = "Relu", layers: int = 2, cube: int = -1
) -> ir.Model:
    """One layer for all experts, `layers` more for each, a gate (float32 second layer) and a weighted sum."""
    each = range(count)
    body = [
        f"s = Gemm<transB=1>(x, stem, stem_b) t = {activation}(s)",
        f"{', '.join(f'h0_{i}' for i in each)} = Split<axis=1>(t, sizes)",
    ]
    sizes: dict[str, Any] = {"stem": (count * 128, 64), "stem_b": (count * 128,), "sizes": [128] * count}
    for i in each:
        for layer in range(1, layers + 1):
            end = f"o{layer}_{i}" if layer < layers else f"e_{i}"
            body.append(f"{end} = Gemm<transB=1>(h{layer - 1}_{i}, w{layer}_{i}, b{layer}_{i})")
            body.append(f"h{layer}_{i} = {activation}({end})" if layer < layers else "")
            sizes |= {f"w{layer}_{i}": (128, 128), f"b{layer}_{i}": (128,)}
    body += [
        f"flat = Concat<axis=1>({', '.join(f'e_{i}' for i in each)}) cube = Reshape(flat, cube_size)",
        f"g = Gemm<transB=1>(flat, gate, gate_b) a = {activation}(g) l = Gemm<transB=1>(a, last, last_b)",
        "p = Softmax<axis=-1>(l) row = Unsqueeze(p, axis_1) f = MatMul(row, cube) y = Squeeze(f, axis_1)",
    ]
    sizes |= {"gate": (64, count * 128), "gate_b": (64,), "last": (count, 64), "last_b": (count,)}
    sizes |= {"axis_1": [1], "cube_size": [cube, count, 128]}
    outputs = f"float[batch, 128] y, float[batch, {count}] p"
    return net(" ".join(body), opset=opset, outputs=outputs, **sizes)


def run(model: ir.Model, rows: Mapping[str, NDArray[np.float32]], optimized: Path | None = None) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(rows)), strict=True))


def convolutions(model: ir.Model) -> list[int]:
    """The number of groups of each convolution, in order."""
    return [node.attributes["group"].as_int() for node in model.graph if node.op_type == "Conv"]


ROUNDING = 0.037
"""Of the spread of the values, what rounding alone comes to over four layers: what a layer reads and gives lies
within about 6.5 spreads in 255 steps, weights within 6.6 in 126, and a rounding is off by step / √12:
√(4 · (2 · 0.0074² + 0.0151²))."""


def error(found: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """Of the spread of the values."""
    return float(np.sqrt(np.mean((found - exact) ** 2)) / np.std(exact))


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """`convert(model, kept)`: a converted copy, by ranges over ROWS, and what was converted."""

    def converted(model: ir.Model, kept: frozenset[str] = NONE) -> tuple[ir.Model, tuple[str, ...]]:
        copy = model.clone()
        names = StaticInt8(measure_ranges(model, {"x": ROWS}, tmp_path)).convert(copy, kept)
        onnx.checker.check_model(ir.to_proto(copy), full_check=True)
        return copy, names

    return converted


@pytest.mark.parametrize("opset", [18, 21, newest_opset()])
def test_a_mixture_becomes_grouped_convolutions_that_onnxruntime_fuses(
    convert: Convert, opset: int, tmp_path: Path
) -> None:
    model = mixture(opset=opset)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    converted, names = convert(model)
    assert convolutions(converted) == [1, 3, 3, 1]
    assert count_int8_convolutions(converted.graph) == 4
    assert set(names) == {"stem", "gate", *(f"w{layer}_{i}" for layer in (1, 2) for i in range(3))}
    assert Counter(node.op_type for node in converted.graph)["Gemm"] == 1  # the gate's second layer
    exact, found = run(model, {"x": ROWS}), run(converted, {"x": ROWS}, tmp_path / "optimized.onnx")
    assert error(found["y"], exact["y"]) < ROUNDING
    assert error(found["p"], exact["p"]) < ROUNDING
    optimized = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert optimized["QLinearConv"] == 4
    assert "Conv" not in optimized
    assert "Transpose" not in optimized  # they cancel, in and out
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    for name, values in run(convert(mixture(opset=21))[0], {"x": ROWS}).items():
        np.testing.assert_array_equal(values, found[name])


@pytest.mark.parametrize("opset", [19, 21, newest_opset()])
@pytest.mark.parametrize("activation", ["Relu", "Tanh"])
def test_the_reference_evaluator_agrees_within_a_step(
    convert: Convert, opset: int, activation: str, tmp_path: Path
) -> None:
    """Where the two round a tie differently, an integer differs by one: y is off by one step at most.

    The evaluator knows these operators from opset 19 on; the test above compares opset 18 with 21.
    """
    model = mixture(opset=opset, activation=activation)
    converted, _ = convert(model)
    ranges = measure_ranges(model, {"x": ROWS}, tmp_path).layers["w2_0"].output
    feed = {"x": ROWS[:7]}
    found = run(converted, feed)
    expected = dict(zip(found, ReferenceEvaluator(ir.to_proto(converted)).run(None, feed), strict=True))
    step = (ranges.high - ranges.low) / 255
    assert np.abs(found["y"] - expected["y"]).max() <= step


@pytest.mark.parametrize("cube", [-1, 0])
def test_a_row_does_not_depend_on_its_batch(convert: Convert, cube: int) -> None:
    """With 0 in a Reshape, which takes over an axis by its position, as well as without. What float32 is
    left, a product with two rows or seven, rounds 8 sums of numbers near 1 in another order."""
    converted, _ = convert(mixture(cube=cube))
    whole = run(converted, {"x": ROWS[:64]})
    for batch in (1, 2, 7):
        found = run(converted, {"x": ROWS[:batch]})
        for name, values in found.items():
            np.testing.assert_allclose(values, whole[name][:batch], rtol=0, atol=8 * 2.0**-24)


@pytest.mark.parametrize("activation", ["Tanh", "Gelu", "LeakyRelu<alpha=0.2>", "Sigmoid"])
def test_other_activations_are_computed_in_float_on_groups_too(
    convert: Convert, activation: str, tmp_path: Path
) -> None:
    model = mixture(activation=activation)
    converted, _ = convert(model)
    assert convolutions(converted) == [1, 3, 3, 1]
    exact, found = run(model, {"x": ROWS}), run(converted, {"x": ROWS}, tmp_path / "optimized.onnx")
    assert error(found["y"], exact["y"]) < ROUNDING
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert counts["QLinearConv"] == 4
    assert [node.op_type for node in converted.graph].count(activation.partition("<")[0]) == 3


@pytest.mark.parametrize(("layers", "expected"), [(1, [1, 3, 1]), (3, [1, 3, 3, 3, 1])])
def test_experts_of_any_depth(convert: Convert, layers: int, expected: list[int]) -> None:
    model = mixture(layers=layers)
    converted, _ = convert(model)
    assert convolutions(converted) == expected
    assert error(run(converted, {"x": ROWS})["y"], run(model, {"x": ROWS})["y"]) < ROUNDING


@pytest.mark.parametrize("kept", ["w1_1", "w2_0", "stem", "gate"])
def test_a_kept_layer_stays_and_the_others_go_on(convert: Convert, kept: str) -> None:
    model = mixture()
    converted, names = convert(model, frozenset({kept}))
    assert kept not in names
    assert len(names) == 7
    gemms = [str(node.inputs[1].name) for node in converted.graph if node.op_type == "Gemm"]
    assert sorted(gemms) == sorted([kept, "last"])
    assert error(run(converted, {"x": ROWS})["y"], run(model, {"x": ROWS})["y"]) < ROUNDING


def test_layers_that_differ_are_converted_one_by_one(convert: Convert) -> None:
    """Two pieces of one Split, into layers of different widths a third is read by nothing."""
    model = net(
        "s = Gemm<transB=1>(x, stem, stem_b) a, b, c = Split<axis=1>(s, sizes) "
        "d = Gemm<transB=1>(a, wide, wide_b) e = Gemm<transB=1>(b, wider, wider_b) "
        "y = Concat<axis=1>(d, e)",
        stem=(384, 64), stem_b=(384,), sizes=[128, 128, 128],
        wide=(128, 128), wide_b=(128,), wider=(160, 128), wider_b=(160,),
    )  # fmt: skip
    converted, names = convert(model)
    assert convolutions(converted) == [1, 1, 1]
    assert set(names) == {"stem", "wide", "wider"}
    assert error(run(converted, {"x": ROWS})["y"], run(model, {"x": ROWS})["y"]) < ROUNDING


def test_group_outputs_that_are_read_apart(convert: Convert) -> None:
    """No Concat, one output leaves the graph, and pieces that the next layers read in another order."""
    model = net(
        "s = Gemm<transB=1>(x, stem, stem_b) a, b = Split<axis=1>(s, sizes) "
        "y = Gemm<transB=1>(a, w0, b0) d = Gemm<transB=1>(b, w1, b1) "
        "z = Concat<axis=1>(d, y) v = Gemm<transB=1>(z, w2, b2)",
        outputs="float[batch, 128] y, float[batch, 256] z, float[batch, 64] v",
        stem=(512, 64), stem_b=(512,), sizes=[256, 256],
        w0=(128, 256), b0=(128,), w1=(128, 256), b1=(128,), w2=(64, 256), b2=(64,),
    )  # fmt: skip
    converted, _ = convert(model)
    assert convolutions(converted) == [1, 2, 1]
    exact, found = run(model, {"x": ROWS}), run(converted, {"x": ROWS})
    assert list(found) == ["y", "z", "v"]
    for name, values in found.items():
        assert error(values, exact[name]) < ROUNDING, name


def test_a_relu_that_is_not_the_only_reader_is_not_fused(convert: Convert) -> None:
    model = net(
        "y = Gemm<transB=1>(x, w, b) z = Relu(y) v = Gemm<transB=1>(z, w2, b2)",
        outputs="float[batch, 256] y, float[batch, 64] v",
        w=(256, 64), b=(256,), w2=(64, 256), b2=(64,),
    )  # fmt: skip
    converted, _ = convert(model)
    exact, found = run(model, {"x": ROWS}), run(converted, {"x": ROWS})
    assert found["y"].min() < -1  # what the Relu would have cut off
    for name, values in found.items():
        assert error(values, exact[name]) < ROUNDING, name


def test_a_graph_without_anything_to_convert_stays_as_it_is(convert: Convert) -> None:
    model = net("h = Gemm<transB=1>(x, w, b) y = Relu(h)", w=(32, 64), b=(32,))
    converted, names = convert(model)
    assert names == ()
    assert count_int8_convolutions(converted.graph) == 0
    assert ir.to_proto(converted).SerializeToString(deterministic=True) == ir.to_proto(
        model
    ).SerializeToString(deterministic=True)


def test_layers_stored_in_out_or_without_a_bias(convert: Convert) -> None:
    model = net(
        "h = Gemm(x, w, b) r = Relu(h) y = Gemm<transB=1>(r, w2)", w=(64, 256), b=(256,), w2=(64, 256)
    )
    converted, names = convert(model)
    assert names == ("w", "w2")
    assert error(run(converted, {"x": ROWS})["y"], run(model, {"x": ROWS})["y"]) < ROUNDING


def test_a_bias_far_beyond_its_row_of_weights_fits_int32(convert: Convert) -> None:
    """In steps of input scale times weight scale it would be 1e17; the weights of that row count for nothing."""
    weight = (np.random.default_rng(2).standard_normal((256, 64)) / 8).astype(np.float32)
    bias = np.zeros(256, np.float32)
    weight[3], bias[3] = 1e-15, 2.0
    model = net("y = Gemm<transB=1>(x, w, b)", w=weight, b=bias)
    converted, _ = convert(model)
    found = run(converted, {"x": ROWS})["y"]
    step = np.ptp(run(model, {"x": ROWS})["y"]) / 255
    np.testing.assert_allclose(found[:, 3], 2.0, rtol=0, atol=step)


def test_a_weight_that_two_layers_share_has_one_scale_and_two_biases(convert: Convert) -> None:
    model = net(
        "h = Gemm<transB=1>(x, stem, stem_b) a = Gemm<transB=1>(h, w, b) y = Gemm<transB=1>(a, w, b2)",
        stem=(128, 64), stem_b=(128,), w=(128, 128), b=(128,), b2=(128,),
    )  # fmt: skip
    converted, names = convert(model)
    assert names == ("w",)
    assert [name for name in converted.graph.initializers if name.startswith("w")] == [
        "w.int8", "w.scales", "w.bias", "w.bias_scales",
        "w#2.int8", "w#2.scales", "w#2.bias", "w#2.bias_scales",
    ]  # fmt: skip
    assert error(run(converted, {"x": ROWS})["y"], run(model, {"x": ROWS})["y"]) < ROUNDING


def test_a_layer_too_small_to_convert_keeps_no_other_from_it() -> None:
    """19,200 weights on average, and the smaller layer has 12,800."""
    model = net(
        "h = Gemm<transB=1>(x, stem, stem_b) a = Gemm<transB=1>(h, wide, wide_b) b = Gemm<transB=1>(h, thin, thin_b) "
        "y = Concat<axis=1>(a, b)",
        stem=(128, 64), stem_b=(128,), wide=(200, 128), wide_b=(200,), thin=(100, 128), thin_b=(100,),
    )  # fmt: skip
    assert not stack_linears(model.graph, before_cut=False).applied
    assert [weight_names(layer) for layer in linear_layers(model.graph)] == [("wide",)]


@pytest.fixture(scope="module", params=["exact", "none"])
def variant(
    request: pytest.FixtureRequest,
    wide_graphs: Callable[..., GraphSet],
    tmp_path_factory: pytest.TempPathFactory,
) -> Variant:
    """Every graph of a model whose heads are too small to convert, what was measured, and the rows it was
    measured with. Not to be changed."""
    graphs = wide_graphs(request.param)
    rows = np.random.default_rng(3).standard_normal((128, 96)).astype(np.float32)
    return graphs, measure_ranges(graphs.joint, {"x": rows}, tmp_path_factory.mktemp("ranges")), rows


def converted_set(graphs: GraphSet, form: StaticInt8, kept: frozenset[str] = NONE) -> GraphSet:
    """A converted copy."""
    copies = graphs.changed(ir.Model.clone)
    for model in copies.models:
        form.convert(model, kept)
    return copies


@pytest.mark.parametrize("kept", [NONE, frozenset({"gating_networks.1.gate.0.weight"})])
def test_joint_task_and_tail_graphs_give_the_same_numbers(variant: Variant, kept: frozenset[str]) -> None:
    """The integers are the same, and so is all but the order of float32 sums: 1e-6 of the largest output."""
    graphs, ranges, rows = variant
    converted = converted_set(graphs, StaticInt8(ranges), kept)
    for batch in (1, 7, 64):
        joint = run(converted.joint, {"x": rows[:batch]})
        features = run(converted.trunk, {"x": rows[:batch]})
        for name, values in run(converted.joint_tails, features).items():
            limit = 1e-6 * np.abs(joint[name]).max()
            np.testing.assert_allclose(values, joint[name], rtol=0, atol=limit)
        for task in graphs.tasks:
            for found in (
                run(converted.tasks[task], {"x": rows[:batch]}),
                run(converted.tails[task], features),
            ):
                for name, values in found.items():
                    expected = joint[f"{task}.{name}"]
                    limit = 1e-6 * np.abs(expected).max()
                    np.testing.assert_allclose(values, expected, rtol=0, atol=limit)


def test_what_the_joint_graph_stacks_with_a_kept_weight_is_kept_everywhere(variant: Variant) -> None:
    graphs, ranges, _ = variant
    form = StaticInt8(ranges)
    kept = "gating_networks.1.gate.0.weight"
    names = {name: form.convert(model.clone(), frozenset({kept})) for name, model in graphs.tasks.items()}
    other = "gating_networks.0.gate.0.weight"
    stacked = ranges.layers[other].together
    assert (kept in stacked) == (len(stacked) == 3)
    assert (other in names["task_0"]) == (kept not in stacked)
    assert kept not in names["task_1"]
    assert (other in form.convert(graphs.joint.clone(), frozenset({kept}))) == (other in names["task_0"])


def test_the_numbers_stay_near_float32_in_every_graph(variant: Variant) -> None:
    graphs, ranges, rows = variant
    converted = converted_set(graphs, StaticInt8(ranges))
    exact, found = run(graphs.joint, {"x": rows}), run(converted.joint, {"x": rows})
    for name, values in found.items():
        assert np.sqrt(np.mean((values - exact[name]) ** 2)) < ROUNDING * np.abs(exact[name]).max(), name


def test_graphs_share_the_bytes_of_the_joint_graph(variant: Variant) -> None:
    graphs, ranges, _ = variant
    converted = converted_set(graphs, StaticInt8(ranges))
    joint = plan_weights([converted.joint.graph]).size_bytes
    together = plan_weights([model.graph for model in converted.models]).size_bytes
    assert together <= 1.02 * joint
    assert together < 0.4 * plan_weights([model.graph for model in graphs.models]).size_bytes


def test_every_graph_of_a_variant_is_valid(variant: Variant) -> None:
    graphs, ranges, _ = variant
    for model in converted_set(graphs, StaticInt8(ranges)).models:
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        assert count_int8_convolutions(model.graph) > 0

"""Convolutions in 8 bits: within their rounding, run by onnxruntime in integers, each weight stored once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from te_export.precision.block_weights import BlockWeights
from te_export.precision.static import activation_ranges
from te_export.precision.static.activation_ranges import Range, measure_ranges
from te_export.precision.static.convolutions import convolutions
from te_export.precision.static.static_int8 import StaticInt8
from te_export.precision.units import layer_units

NONE: frozenset[str] = frozenset()
IMAGES = np.random.default_rng(1).standard_normal((24, 16, 24, 24)).astype(np.float32)


def net(body: str, **sizes: Any) -> ir.Model:
    """x (batch, 16, 24, 24) → y. A size is the shape of a seeded weight; a float is the value of a constant."""
    header = '<ir_version: 10, opset_import: ["": 21]> net (float[batch, 16, 24, 24] x) => (float[batch, n, h, w] y)'
    proto = onnx.parser.parse_model(f"{header} {{ {body} }}")
    rng = np.random.default_rng(0)
    for name, size in sizes.items():
        if isinstance(size, float):
            values = np.array(size, np.float32)
        else:
            values = (rng.standard_normal(size) / np.sqrt(np.prod(size[1:], dtype=int))).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{index}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def run(
    model: ir.Model, optimized: Path | None = None, x: NDArray[np.float32] = IMAGES
) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return found


def converted(model: ir.Model, folder: Path, kept: frozenset[str] = NONE) -> tuple[ir.Model, tuple[str, ...]]:
    copy = model.clone()
    names = StaticInt8(measure_ranges(model, {"x": IMAGES}, folder)).convert(copy, kept)
    onnx.checker.check_model(ir.to_proto(copy), full_check=True)
    return copy, names


def error(found: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """Of the spread of the values."""
    return float(np.sqrt(np.mean((found - exact) ** 2)) / np.std(exact))


CHAIN = (
    "a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r) "
    "y = Conv(p, w2, b2)"
)
CHAIN_SIZES = {"w1": (16, 16, 3, 3), "b1": (16,), "w2": (24, 16, 3, 3), "b2": (24,)}


def test_onnxruntime_runs_them_in_integers(tmp_path: Path) -> None:
    model = net(CHAIN, **CHAIN_SIZES)

    found, names = converted(model, tmp_path)

    assert names == ("w1", "w2")
    assert error(run(found, tmp_path / "optimized.onnx"), run(model)) < 0.03
    optimized = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert optimized["QLinearConv"] == 2
    assert not {"Conv", "Relu"} & set(optimized)
    assert {
        name: value.dtype for name, value in found.graph.initializers.items() if name.startswith("w1.")
    } == {
        "w1.int8": ir.DataType.INT8,
        "w1.scales": ir.DataType.FLOAT,
        "w1.bias": ir.DataType.INT32,
        "w1.bias_scales": ir.DataType.FLOAT,
    }


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ("<strides=[2,2], pads=[1,0,1,0]>", (16, 16, 3, 3)),
        ("<dilations=[2,2]>", (16, 16, 3, 3)),
        ("<group=4>", (16, 4, 5, 5)),
        ('<auto_pad="SAME_UPPER">', (16, 16, 4, 4)),
        ("<group=16>", (64, 1, 3, 3)),
        ("", (32, 16, 1, 1)),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_attributes_are_kept(attributes: str, shape: tuple[int, ...], bias: bool, tmp_path: Path) -> None:
    body = f"y = Conv{attributes}(x, w{', b' if bias else ''})"
    model = net(body, w=shape, **({"b": shape[:1]} if bias else {}))

    found, names = converted(model, tmp_path)

    assert names == ("w",)
    answer, exact = run(found), run(model)
    assert answer.shape == exact.shape
    assert 0 < error(answer, exact) < 0.03


def test_a_row_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    found, _ = converted(net(CHAIN, **CHAIN_SIZES), tmp_path)
    batch = np.concatenate([IMAGES[:3], 50 * IMAGES[3:4]])

    np.testing.assert_array_equal(run(found, x=batch)[:3], run(found, x=IMAGES[:3]))


def test_what_several_nodes_read_is_rounded_for_each_alike(tmp_path: Path) -> None:
    model = net(
        "a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a) l = Conv(r, w2, b2) k = Conv(r, w3) s = Add(l, k) "
        "n = Neg(r) t = Slice(n, from, to, axes) y = Add(s, t)",
        **CHAIN_SIZES | {"w2": (16, 16, 3, 3), "b2": (16,), "w3": (16, 16, 3, 3)},
    )
    for name, values in (("from", [0, 0]), ("to", [22, 22]), ("axes", [2, 3])):
        tensor = ir.tensor(np.asarray(values, np.int64), name=name)
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value, value.shape, value.type = tensor, ir.Shape([2]), ir.TensorType(ir.DataType.INT64)
        model.graph.register_initializer(value)

    found, names = converted(model, tmp_path)

    assert names == ("w1", "w2", "w3")
    counts = Counter(node.op_type for node in found.graph)
    assert counts["QuantizeLinear"] == 4  # x, and what each convolution gives
    assert error(run(found), run(model)) < 0.05


def test_kept_small_and_fed_convolutions_stay(tmp_path: Path) -> None:
    model = net(CHAIN, **CHAIN_SIZES)
    found, names = converted(model, tmp_path, frozenset({"w1"}))
    assert names == ("w2",)
    assert "w1" in found.graph.initializers

    few_places = net("y = Conv<strides=[12,12]>(x, w)", w=(16, 16, 3, 3))  # 2,304 weights at 4 places: 9,216
    assert list(convolutions(few_places.graph)) == []
    fed = net("y = Conv(x, w)", w=(16, 16, 3, 3))
    fed.graph.inputs.append(fed.graph.initializers["w"])
    assert list(convolutions(fed.graph)) == []


def test_one_weight_at_two_places_has_one_scale_and_is_a_unit(tmp_path: Path) -> None:
    model = net("a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a) y = Conv<pads=[1,1,1,1]>(r, w)", w=(16, 16, 3, 3))

    ranges = measure_ranges(model, {"x": IMAGES}, tmp_path).layers
    found, names = converted(model, tmp_path)

    assert set(ranges) == {"w"}
    assert names == ("w",)
    assert layer_units(model.graph) == [{"w"}]
    assert [name for name in found.graph.initializers if name.endswith(".int8")] == ["w.int8"]
    assert error(run(found), run(model)) < 0.05


def test_ranges_are_those_after_the_relu(tmp_path: Path) -> None:
    found = measure_ranges(net(CHAIN, **CHAIN_SIZES), {"x": IMAGES}, tmp_path).layers

    assert found["w1"].input == Range(float(IMAGES.min()), float(IMAGES.max()))
    assert found["w1"].output.low == 0.0
    assert found["w2"].input == found["w1"].output
    assert found["w2"].output.low < 0
    assert found["w1"].together == ("w1",)


def test_units_go_by_depth_and_shape() -> None:
    model = net(CHAIN, **CHAIN_SIZES)
    assert layer_units(model.graph) == [{"w1"}, {"w2"}]


@pytest.mark.parametrize("bits", [8, 4])
def test_forms_in_blocks_leave_them(bits: Any) -> None:
    model = net(CHAIN, **CHAIN_SIZES)
    assert BlockWeights(bits).convert(model, NONE) == ()
    assert Counter(node.op_type for node in model.graph)["Conv"] == 2


def test_a_relu_beside_which_the_convolution_is_read_is_not_part_of_it(tmp_path: Path) -> None:
    """The joint graph reads a convolution with and without its Relu; the graph of one task reads it after the Relu."""
    body = "a = Conv(x, w, b) r = Relu(a)"
    sizes = {"w": (16, 16, 3, 3), "b": (16,)}
    joint = net(f"{body} y = Sum(a, r)", **sizes)
    one = net("a = Conv(x, w, b) y = Relu(a)", **sizes)
    form = StaticInt8(measure_ranges(joint, {"x": IMAGES}, tmp_path))

    assert form.convert(joint, NONE) == form.convert(one, NONE) == ("w",)

    raw = (run(joint) - run(one)).astype(np.float32)  # y = a + max(a, 0)
    np.testing.assert_allclose(np.maximum(raw, 0), run(one), rtol=0, atol=1e-5)
    optimized = tmp_path / "optimized.onnx"
    run(one, optimized)
    assert Counter(node.op_type for node in onnx.load(optimized).graph.node)["QLinearConv"] == 1


@pytest.mark.parametrize(
    ("node", "ends", "stays"),
    [
        ("Relu(a)", {}, False),
        ("Clip(a, low, high)", {"low": 0.0, "high": 0.5}, False),
        ("Clip(a, low, high)", {"low": -0.3, "high": 0.4}, False),
        ("Clip(a, , high)", {"high": 0.5}, False),
        ("Clip(a, low)", {"low": -0.3}, False),
        ("Clip(a, low)", {"low": 0.3}, True),  # a range includes zero
        ("Tanh(a)", {}, True),
    ],
)
def test_what_keeps_values_within_limits_is_done_by_rounding_them(
    node: str, ends: dict[str, float], stays: bool, tmp_path: Path
) -> None:
    model = net(f"a = Conv(x, w, b) y = {node}", w=(16, 16, 3, 3), b=(16,), **ends)

    after, _ = converted(model, tmp_path)

    assert (node.split("(")[0] in [step.op_type for step in after.graph]) == stays
    found, exact = run(after), run(model)
    assert error(found, exact) < 0.05
    step = (exact.max() - exact.min()) / 255
    assert exact.min() - step / 2 <= found.min() < found.max() <= exact.max() + step / 2


def test_limits_that_are_computed_stay(tmp_path: Path) -> None:
    model = net(
        "a = Conv(x, w, b) high = ReduceMax<keepdims=0>(x) y = Clip(a, , high)", w=(16, 16, 3, 3), b=(16,)
    )
    found, _ = converted(model, tmp_path)
    assert "Clip" in [node.op_type for node in found.graph]
    assert error(run(found), run(model)) < 0.02


def test_large_images_are_looked_at_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net(CHAIN, **CHAIN_SIZES)
    whole = measure_ranges(model, {"x": IMAGES}, tmp_path)
    monkeypatch.setattr(activation_ranges, "_BATCH_NUMBERS", 100_000)

    found = measure_ranges(model, {"x": IMAGES}, tmp_path)

    for name, span in whole.layers.items():
        for one, other in ((span.input, found.layers[name].input), (span.output, found.layers[name].output)):
            np.testing.assert_allclose((one.low, one.high), (other.low, other.high), rtol=1e-5)
    assert activation_ranges._rows_at_once([model.graph.inputs[0]]) == 100_000 // (16 * 24 * 24)

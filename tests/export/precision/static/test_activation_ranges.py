"""What is measured over calibration rows, which layers share a range, and which data is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from te_export.errors import OutputError, UsageError
from te_export.partition import GraphSet
from te_export.precision.static.activation_ranges import LayerRange, Range, measure_ranges

ROWS = np.random.default_rng(1).standard_normal((150, 64)).astype(np.float32)
ROUNDING = 256 * 2.0**-24
"""Of the magnitude of a sum of 256 terms in float32, against the same in another order."""


def net(body: str, *, outputs: str = "float[batch, n] y", **sizes: Any) -> ir.Model:
    """x (batch, 64) → outputs. A size is the shape of a seeded weight, or the values of an int64 constant."""
    header = f'<ir_version: 10, opset_import: ["": 21]> net (float[batch, 64] x) => ({outputs})'
    proto = onnx.parser.parse_model(f"{header} {{ {body} }}")
    rng = np.random.default_rng(0)
    for name, size in sizes.items():
        values: NDArray[Any] = (
            np.asarray(size, np.int64)
            if isinstance(size, list)
            else (rng.standard_normal(size) / 8).astype(np.float32)
        )
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def weight(model: ir.Model, name: str) -> NDArray[np.float64]:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy().astype(np.float64)


def assert_range(found: Range, *values: NDArray[np.float64]) -> None:
    """`found` is that of all values and zero."""
    low, high = min(0.0, *(v.min() for v in values)), max(0.0, *(v.max() for v in values))
    size = max(-low, high)
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=0, atol=ROUNDING * size)


def test_inputs_and_outputs_over_all_rows_after_a_relu(tmp_path: Path) -> None:
    """150 rows are two batches and a part of one; what is extreme stands in the last row."""
    model = net(
        "h = Gemm<transB=1>(x, w, b) r = Relu(h) y = Gemm<transB=1>(r, w2, b2)",
        w=(256, 64), b=(256,), w2=(64, 256), b2=(64,),
    )  # fmt: skip
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    rows = ROWS.copy()
    rows[-1] *= 10
    ranges = measure_ranges(model, {"x": rows}, tmp_path).layers
    assert set(ranges) == {"w", "w2"}
    hidden = np.maximum(rows @ weight(model, "w").T + weight(model, "b"), 0)
    assert_range(ranges["w"].input, rows.astype(np.float64))
    assert_range(ranges["w"].output, hidden)
    assert ranges["w2"].input == ranges["w"].output
    assert_range(ranges["w2"].output, hidden @ weight(model, "w2").T + weight(model, "b2"))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_zero_is_always_inside(tmp_path: Path) -> None:
    model = net("y = Gemm<transB=1>(x, w, b)", w=(256, 64), b=(256,))
    low = measure_ranges(model, {"x": np.abs(ROWS) + 5}, tmp_path).layers["w"].input
    high = measure_ranges(model, {"x": -np.abs(ROWS) - 5}, tmp_path).layers["w"].input
    assert low.low == 0
    assert low.high > 5
    assert high.low < -5
    assert high.high == 0


def test_another_activation_is_left_out_of_the_output(tmp_path: Path) -> None:
    model = net(
        "h = Gemm<transB=1>(x, w, b) t = Tanh(h) y = Gemm<transB=1>(t, w2, b2)",
        w=(256, 64), b=(256,), w2=(64, 256), b2=(64,),
    )  # fmt: skip
    ranges = measure_ranges(model, {"x": ROWS}, tmp_path).layers
    hidden = ROWS @ weight(model, "w").T + weight(model, "b")
    assert_range(ranges["w"].output, hidden)
    assert_range(ranges["w2"].input, np.tanh(hidden))


EXPERTS = """
    s = Gemm<transB=1>(x, stem, stem_b) t = {activation}(s) p, q = Split<axis=1>(t, sizes)
    c = Gemm<transB=1>(p, w0, b0) d = Gemm<transB=1>(q, w1, b1)
"""
SIZES: dict[str, Any] = {
    "stem": (256, 64), "stem_b": (256,), "sizes": [128, 128],
    "w0": (128, 128), "b0": (128,), "w1": (128, 128), "b1": (128,),
}  # fmt: skip


@pytest.mark.parametrize("activation", ["Relu", "Tanh"])
def test_the_layers_of_a_group_share_a_range_with_what_reads_them(activation: str, tmp_path: Path) -> None:
    body = EXPERTS.format(activation=activation)
    model = net(
        body + "flat = Concat<axis=1>(c, d) y = Gemm<transB=1>(flat, gate, gate_b)",
        **SIZES, gate=(64, 256), gate_b=(64,),
    )  # fmt: skip
    ranges = measure_ranges(model, {"x": ROWS}, tmp_path).layers
    stem = ROWS @ weight(model, "stem").T + weight(model, "stem_b")
    active = np.maximum(stem, 0) if activation == "Relu" else np.tanh(stem)
    ends = [
        active[:, 128 * i : 128 * (i + 1)] @ weight(model, f"w{i}").T + weight(model, f"b{i}") for i in (0, 1)
    ]
    assert (ranges["w0"].input, ranges["w0"].output) == (ranges["w1"].input, ranges["w1"].output)
    assert_range(ranges["w0"].input, active)
    assert_range(ranges["w0"].output, *ends)
    assert ranges["gate"].input == ranges["w0"].output
    if activation == "Relu":
        assert ranges["stem"].output == ranges["w0"].input


def test_what_a_concat_takes_from_elsewhere_does_not_widen_a_layer(tmp_path: Path) -> None:
    """x is a hundred times what the layer gives; only the reader of both has to hold it."""
    model = net(
        "k = Mul(x, x) h = Gemm<transB=1>(x, w, b) "
        "z = Concat<axis=1>(h, k) y = Gemm<transB=1>(z, w2, b2)",
        w=(256, 64), b=(256,), w2=(64, 320), b2=(64,),
    )  # fmt: skip
    ranges = measure_ranges(model, {"x": 100 * ROWS}, tmp_path).layers
    rows = 100.0 * ROWS.astype(np.float64)
    hidden = rows @ weight(model, "w").T + weight(model, "b")
    assert_range(ranges["w"].output, hidden)
    assert_range(ranges["w2"].input, hidden, rows * rows)


def test_a_weight_that_layers_share_has_one_range(tmp_path: Path) -> None:
    model = net(
        "h = Gemm<transB=1>(x, stem, stem_b) a = Gemm<transB=1>(h, w, b) y = Gemm<transB=1>(a, w, b2)",
        stem=(128, 64), stem_b=(128,), w=(128, 128), b=(128,), b2=(128,),
    )  # fmt: skip
    ranges = measure_ranges(model, {"x": ROWS}, tmp_path).layers
    hidden = ROWS @ weight(model, "stem").T + weight(model, "stem_b")
    first = hidden @ weight(model, "w").T + weight(model, "b")
    second = first @ weight(model, "w").T + weight(model, "b2")
    assert_range(ranges["w"].input, hidden, first, second)  # `first` is input and output
    assert ranges["w"].output == ranges["w"].input


def test_the_parts_of_a_stack_have_its_range_and_know_one_another(
    wide_graphs: Callable[..., GraphSet], tmp_path: Path
) -> None:
    rows = np.random.default_rng(3).standard_normal((100, 96)).astype(np.float32)
    ranges = measure_ranges(wide_graphs("exact").joint, {"x": rows}, tmp_path).layers
    gates = [f"gating_networks.{task}.gate.0.weight" for task in range(3)]
    experts = [ranges[f"experts.{expert}.network.6.weight"].output for expert in range(3)]
    found: set[LayerRange] = {ranges[gate] for gate in gates}
    assert len(found) == 1
    assert found.pop().together == tuple(gates)
    assert {ranges[gates[0]].input, *experts} == {experts[0]}
    assert ranges["experts.0.network.6.weight"].together == ("experts.0.network.6.weight",)


@pytest.mark.parametrize(("value", "row"), [(np.nan, 3), (np.inf, 149), (3e38, 77)])
def test_rows_that_lead_to_no_finite_value_are_refused(value: float, row: int, tmp_path: Path) -> None:
    model = net("y = Gemm<transB=1>(x, w, b)", w=(256, 64), b=(256,))
    rows = ROWS.copy()
    rows[row] = value
    with pytest.raises(UsageError, match=rf"calibration data.* in row {row}, counted from 0"):
        measure_ranges(model, {"x": rows}, tmp_path)


def test_no_rows_are_refused(tmp_path: Path) -> None:
    model = net("y = Gemm<transB=1>(x, w, b)", w=(256, 64), b=(256,))
    with pytest.raises(UsageError, match=r"calibration data has x: 0 rows, expected at least one"):
        measure_ranges(model, {"x": ROWS[:0]}, tmp_path)


def test_a_scratch_folder_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    model = net("y = Gemm<transB=1>(x, w, b)", w=(256, 64), b=(256,))
    with pytest.raises(OutputError, match="could not be written"):
        measure_ranges(model, {"x": ROWS}, tmp_path / "gone")


def test_a_graph_without_layers_to_convert_has_no_ranges(tmp_path: Path) -> None:
    model = net("y = Gemm<transB=1>(x, w, b)", w=(32, 64), b=(32,))
    assert measure_ranges(model, {"x": ROWS}, tmp_path).layers == {}

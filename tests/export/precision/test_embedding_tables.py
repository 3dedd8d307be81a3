"""Embedding tables in 8 and 4 bits: rows within their rounding, each table stored once, and what stays float32."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from te_export.precision.block_weights import BlockWeights
from te_export.precision.embedding_tables import TableWeights, embedding_tables
from te_export.precision.static.static_int8 import ActivationRanges, StaticInt8
from te_export.precision.trial import open_trial
from te_export.precision.units import layer_units

NONE: frozenset[str] = frozenset()
IDS = np.array([[0, 1], [2047, -1], [-2048, 7]])


def tables(*widths: int, rows: int = 2048, lookups: int = 1, seed: int = 0) -> ir.Model:
    """`y<i>` is what `ids` (batch, 2) find in the table `table.<i>` of a width; z<i>, … the same from the same table."""
    rng = np.random.default_rng(seed)
    ids = ir.Value(name="ids", shape=ir.Shape(["batch", 2]), type=ir.TensorType(ir.DataType.INT64))
    graph = ir.Graph([ids], [], nodes=[], opset_imports={"": 21}, name="tables")
    for index, width in enumerate(widths):
        weight = rng.standard_normal((rows, width)).astype(np.float32) * rng.uniform(0.1, 10, (rows, 1))
        weight[3] = 0
        tensor = ir.tensor(weight.astype(np.float32), name=f"table.{index}")
        table = ir.Value(name=tensor.name, const_value=tensor, shape=ir.Shape(weight.shape))
        graph.register_initializer(table)
        for letter in "yz"[:lookups]:
            node = ir.Node("", "Gather", [table, ids], name=f"look_up.{letter}{index}")
            y = node.outputs[0]
            y.name, y.shape = f"{letter}{index}", ir.Shape(["batch", 2, width])
            y.type = ir.TensorType(ir.DataType.FLOAT)
            graph.append(node)
            graph.outputs.append(y)
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, folder: Path) -> dict[str, NDArray[np.generic]]:
    session = open_trial(model, folder)
    return dict(zip((spec.name for spec in session.spec.outputs), session.run({"ids": IDS}), strict=True))


def stored(model: ir.Model) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        name: (value.const_value.dtype.name, tuple(value.const_value.shape.numpy()))
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


@pytest.mark.parametrize("width", [32, 33, 40, 64])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_is_off_by_half_a_step_at_most(bits: Literal[8, 4], width: int, tmp_path: Path) -> None:
    model = tables(width)
    exact = run(model, tmp_path)["y0"]

    assert TableWeights(bits).convert(model, NONE) == ("table.0",)

    found = run(model, tmp_path)["y0"]
    assert found.dtype == np.float32
    steps = 127 if bits == 8 or width % 2 else 7  # an odd number of 4-bit values does not fill bytes
    step = np.abs(exact).max(axis=-1, keepdims=True) / steps
    error = np.abs(found - exact)
    assert (error <= step / 2 * (1 + 1e-5)).all()
    assert error.max() > step.max() / 20


def test_8_bits_are_standard_operators_and_4_take_one(tmp_path: Path) -> None:
    eight, four = tables(32), tables(32)
    TableWeights(8).convert(eight, NONE)
    TableWeights(4).convert(four, NONE)

    assert Counter(node.op_type for node in eight.graph) == {"Gather": 2, "Cast": 1, "Mul": 1}
    assert "com.microsoft" not in eight.graph.opset_imports
    assert stored(eight) == {
        "table.0.rows8": ("INT8", (2048, 32)),
        "table.0.rows8.scales": ("FLOAT", (2048, 1)),
    }
    assert [node.op_type for node in four.graph] == ["GatherBlockQuantized"]
    assert stored(four) == {
        "table.0.rows4": ("UINT8", (2048, 16)),
        "table.0.rows4.scales": ("FLOAT", (2048, 1)),
    }


@pytest.mark.parametrize("bits", [8, 4])
def test_a_table_that_is_looked_up_twice_is_stored_once(bits: Literal[8, 4], tmp_path: Path) -> None:
    model = tables(32, lookups=2)

    assert TableWeights(bits).convert(model, NONE) == ("table.0",)

    assert len(stored(model)) == 2
    found = run(model, tmp_path)
    np.testing.assert_array_equal(found["y0"], found["z0"])


def test_graphs_that_share_a_table_share_its_integers() -> None:
    weights, one, other = TableWeights(8), tables(32), tables(32)
    weights.convert(one, NONE)
    weights.convert(other, NONE)

    for name in ("table.0.rows8", "table.0.rows8.scales"):
        assert one.graph.initializers[name].const_value is other.graph.initializers[name].const_value


def test_kept_tables_stay_float32_or_take_8_bits() -> None:
    eight, four = tables(32, 34), tables(32, 34)

    assert TableWeights(8).convert(eight, frozenset({"table.0"})) == ("table.1",)
    assert TableWeights(4).convert(four, frozenset({"table.0"})) == ("table.0", "table.1")

    assert set(stored(eight)) == {"table.0", "table.1.rows8", "table.1.rows8.scales"}
    assert set(stored(four)) == {
        f"table.{what}" for what in ("0.rows8", "0.rows8.scales", "1.rows4", "1.rows4.scales")
    }


def test_small_tables_other_axes_and_changing_tables_are_no_tables() -> None:
    assert list(embedding_tables(tables(32, rows=2047).graph)) == []
    assert list(embedding_tables(tables(3, rows=30_000).graph)) == []
    sideways = tables(32)
    next(iter(sideways.graph)).attributes["axis"] = ir.AttrInt64("axis", 1)
    assert list(embedding_tables(sideways.graph)) == []
    fed = tables(32)
    fed.graph.inputs.append(fed.graph.initializers["table.0"])
    assert list(embedding_tables(fed.graph)) == []


def test_tables_of_one_width_that_reach_the_same_tasks_are_a_unit() -> None:
    model = tables(32, 32, 34)
    joined = ir.Node(
        "", "Sum", [value for value in model.graph.outputs if value.name in ("y0", "y1")], name="sum"
    )
    joined.outputs[0].name = "both"
    model.graph.append(joined)
    model.graph.outputs[:2] = joined.outputs

    assert layer_units(model.graph) == [{"table.0", "table.1"}, {"table.2"}]


@pytest.mark.parametrize("form", [BlockWeights(8), BlockWeights(4), StaticInt8(ActivationRanges({}))])
def test_every_form_converts_tables(form: BlockWeights | StaticInt8, tmp_path: Path) -> None:
    model = tables(32)
    exact = run(model, tmp_path)["y0"]

    assert form.convert(model, NONE) == ("table.0",)

    found = run(model, tmp_path)["y0"]
    assert 0 < np.abs(found - exact).max() <= np.abs(exact).max() / 14

"""Weights as integers: how far they may be off, the layout onnxruntime reads, and stacks byte by byte."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from te_export.precision.integer_weights import (
    LARGEST_IN_ROWS,
    IntegerWeights,
    quantize_blocks,
    quantize_rows,
)
from te_export.rewrite.linear import Linear, read_linear
from te_export.rewrite.stack import Part, stack_of, stack_tensors

weights = st_numpy.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 70)),
    elements=st.floats(-(2.0**20), 2.0**20, width=32),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weight=weights)
def test_rows_are_off_by_at_most_half_a_step(weight: np.ndarray) -> None:
    values, scales = quantize_rows(weight)

    assert values.dtype == np.int8
    assert values.shape == weight.shape
    assert np.abs(values.astype(int)).max() <= LARGEST_IN_ROWS
    assert np.iinfo(np.int16).max >= 2 * 255 * LARGEST_IN_ROWS
    off = np.abs(values * scales[:, None].astype(np.float64) - weight)
    assert (off <= scales[:, None] * 0.5000001).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weight=weights, bits=st.sampled_from([4, 8]), block=st.sampled_from([16, 32, 128]))
def test_blocks_unpack_to_the_weights(weight: np.ndarray, bits: int, block: int) -> None:
    rows, width = weight.shape
    blocks = -(-width // block)

    packed, scales = quantize_blocks(weight, bits=bits, block=block)

    assert packed.dtype == np.uint8
    assert packed.shape == (rows, blocks, block * bits // 8)
    assert scales.shape == (rows * blocks,)
    values = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1)
    centred = values.reshape(rows * blocks, block).astype(int) - (1 << (bits - 1))
    found = (centred * scales[:, None].astype(np.float64)).reshape(rows, -1)
    allowed = np.repeat(scales, block).reshape(rows, -1) * 0.5000001
    assert (np.abs(found[:, :width] - weight) <= allowed[:, :width]).all()
    assert not found[:, width:].any()


@pytest.mark.parametrize(
    "quantize", [quantize_rows, lambda weight: quantize_blocks(weight, bits=8, block=16)]
)
def test_zeros_stay_zeros(quantize: object) -> None:
    values, scales = quantize(np.zeros((3, 20), np.float32))  # type: ignore[operator]

    assert (scales == 1).all()
    assert len(np.unique(values)) == 1


def linear_of(tensor: ir.TensorProtocol, name: str, *, turned: bool = False) -> Linear:
    """A layer with this weight."""
    x = ir.Value(name="x")
    weight = ir.Value(name=name, const_value=tensor)
    node = ir.Node(
        "", "Gemm", [x, weight], attributes=ir.convenience.convert_attributes({"transB": int(not turned)})
    )
    graph = ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 21})
    graph.register_initializer(weight)
    linear = read_linear(node)
    assert isinstance(linear, Linear)
    return linear


def test_a_stack_is_the_stack_of_its_quantized_parts() -> None:
    rng = np.random.default_rng(0)
    parts = [
        Part(name, ir.tensor(rng.standard_normal((rows, 24)).astype(np.float32), name=name))
        for name, rows in (("a", 3), ("b", 5))
    ]
    store = IntegerWeights(quantize_rows, "int8")
    alone = [store.of(linear_of(part.tensor, part.name)) for part in parts]

    stacked = store.of(linear_of(stack_tensors("a+1", parts, (8, 24)), "a+1"))

    assert np.array_equal(stacked.values.numpy(), np.concatenate([q.values.numpy() for q in alone]))
    assert np.array_equal(stacked.scales.numpy(), np.concatenate([q.scales.numpy() for q in alone]))
    stack = stack_of(stacked.values)
    assert stack is not None
    assert [part.name for part in stack.parts] == ["a.int8", "b.int8"]
    assert [part.tensor for part in stack.parts] == [q.values for q in alone]


def test_a_turned_weight_is_quantized_by_output() -> None:
    weight = np.random.default_rng(0).standard_normal((24, 3)).astype(np.float32)

    found = IntegerWeights(quantize_rows, "int8").of(linear_of(ir.tensor(weight, name="w"), "w", turned=True))

    assert np.array_equal(found.values.numpy(), quantize_rows(weight.T)[0])

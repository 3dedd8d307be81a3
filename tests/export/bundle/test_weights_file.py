"""weights.bin: every float tensor above a small size once, aligned, apart, in the order of the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from te_export.bundle.weights_file import (
    PAGE_BYTES,
    SMALL_ALIGNMENT,
    SMALL_BYTES,
    WeightsLayout,
    plan_weights,
    weight_chunks,
)
from te_export.rewrite.stack import Part, stack_tensors

DTYPES = [np.float32, np.float16, np.float64, np.int64, np.int32, np.uint8]


def graph_of(arrays: list[np.ndarray]) -> ir.Graph:
    """A graph whose initializers w0, w1, … hold the arrays."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 18})
    for index, array in enumerate(arrays):
        graph.register_initializer(ir.Value(name=f"w{index}", const_value=ir.tensor(array)))
    return graph


def written(graph: ir.Graph, layout: WeightsLayout) -> bytes:
    return b"".join(bytes(chunk) for chunk in weight_chunks(layout))


arrays = st.lists(
    st.tuples(
        st.sampled_from(DTYPES),
        st.sampled_from([0, 1, 31, 32, 63, 64, 65, 127, 128, 512, 1023, 1024, 1025, 2048, 5000]),
    ),
    max_size=12,
).map(
    lambda kinds: [
        np.random.default_rng(index).integers(1, 100, size).astype(dtype)
        for index, (dtype, size) in enumerate(kinds)
    ]
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(arrays=arrays)
def test_tensors_lie_apart_aligned_and_in_order(arrays: list[np.ndarray]) -> None:
    graph = graph_of(arrays)

    layout = plan_weights([graph])

    large = {f"w{i}": a for i, a in enumerate(arrays) if a.nbytes >= SMALL_BYTES and a.dtype != np.int64}
    assert list(layout.places) == list(large)
    end = 0
    for name, (offset, length) in layout.places.items():
        assert length == large[name].nbytes
        assert offset >= end
        alignment = PAGE_BYTES if length >= PAGE_BYTES else SMALL_ALIGNMENT
        assert offset % alignment == 0
        assert offset - end < alignment
        end = offset + length
    assert layout.size_bytes == end
    data = written(graph, layout)
    assert len(data) == end
    for name, (offset, length) in layout.places.items():
        found = np.frombuffer(data[offset : offset + length], large[name].dtype.newbyteorder("<"))
        assert np.array_equal(found, large[name])


def test_padding_is_zero() -> None:
    graph = graph_of([np.ones(65, np.float32), np.ones(2048, np.float32)])

    layout = plan_weights([graph])

    assert layout.places == {"w0": (0, 260), "w1": (4096, 8192)}
    assert written(graph, layout)[260:4096] == bytes(4096 - 260)


def test_rows_that_are_not_contiguous_are_written_row_by_row() -> None:
    array = np.arange(128 * 3, dtype=np.float32).reshape(3, 128).T
    graph = graph_of([array])

    assert written(graph, plan_weights([graph])) == np.ascontiguousarray(array).tobytes()


def test_a_large_tensor_comes_in_pieces_without_a_copy() -> None:
    array = np.zeros(3 * 2**20, np.float32)  # 12 MiB
    graph = graph_of([array])

    pieces = list(weight_chunks(plan_weights([graph])))

    assert [len(piece) for piece in pieces] == [4 * 2**20] * 3
    for piece in pieces:
        assert isinstance(piece, memoryview)
        assert np.shares_memory(np.frombuffer(piece, np.uint8), array)


def test_a_graph_without_large_tensors_has_an_empty_file() -> None:
    graph = graph_of([np.ones(3, np.float32), np.arange(1000)])

    layout = plan_weights([graph])

    assert layout == WeightsLayout(places={}, written=(), size_bytes=0)
    assert written(graph, layout) == b""


@pytest.mark.parametrize(("size", "is_laid_out"), [(63, False), (64, True)])
def test_the_limit_of_what_is_small(size: int, is_laid_out: bool) -> None:
    assert bool(plan_weights([graph_of([np.ones(size, np.float32)])]).places) is is_laid_out


def stacked(names: str, parts: dict[str, np.ndarray], *, stack: str) -> ir.Graph:
    """A graph whose one initializer is the stack of some parts."""
    chosen = [Part(name, ir.tensor(parts[name])) for name in names]
    axes = [sum(len(parts[name]) for name in names), 40]
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 18})
    graph.register_initializer(ir.Value(name=stack, const_value=stack_tensors(stack, chosen, axes)))
    return graph


def four_parts(rows: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((rows, 40)).astype(np.float32) for name in "abcd"}


@pytest.mark.parametrize("names", ["ab", "bcd", "cd", "abcd", "b"])
@pytest.mark.parametrize("rows", [1, 8])
def test_a_stack_of_neighbours_lies_in_the_stack_there_is(names: str, rows: int) -> None:
    """A row of 40 float32 has 160 bytes: too small for a place of its own, and still found."""
    parts = four_parts(rows)
    whole, piece = stacked("abcd", parts, stack="whole"), stacked(names, parts, stack="piece")

    layout = plan_weights([whole, piece])

    if rows * len(names) * 160 < SMALL_BYTES:
        assert "piece" not in layout.places
        return
    assert [tensor.name for _, tensor in layout.written] == ["whole"]
    offset, length = layout.places["piece"]
    data = written(whole, layout)
    assert data[offset : offset + length] == b"".join(parts[name].tobytes() for name in names)


@pytest.mark.parametrize("names", ["ac", "ba", "abd", "aa", "dabc"])
def test_a_stack_of_parts_that_are_no_neighbours_is_written(names: str) -> None:
    parts = four_parts()
    whole, piece = stacked("abcd", parts, stack="whole"), stacked(names, parts, stack="piece")

    layout = plan_weights([whole, piece])

    assert [tensor.name for _, tensor in layout.written] == ["whole", "piece"]
    offset, length = layout.places["piece"]
    data = written(whole, layout)
    assert data[offset : offset + length] == b"".join(parts[name].tobytes() for name in names)
    assert layout.places["a"] == (layout.places["whole"][0], parts["a"].nbytes)


def test_parts_that_end_where_another_stack_begins_are_one_range_too() -> None:
    """Whatever lies without a gap will do: the bytes are what counts."""
    parts = {name: np.full((8 * 16, 40), index, np.float32) for index, name in enumerate("abcd")}
    assert parts["a"].nbytes * 2 % PAGE_BYTES == 0
    graphs = [stacked("ab", parts, stack="first"), stacked("cd", parts, stack="second")]
    graphs.append(stacked("bc", parts, stack="third"))

    layout = plan_weights(graphs)

    offset, length = layout.places["third"]
    data = written(graphs[0], layout)
    assert data[offset : offset + length] == parts["b"].tobytes() + parts["c"].tobytes()
    assert layout.size_bytes == 4 * parts["a"].nbytes

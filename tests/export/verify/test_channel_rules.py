"""Regions through the operators of convolutional networks: as exact as said, and never too little."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from te_export.verify.dependencies import Region, dependencies_of

Axes = tuple[int | str, ...]
ROWS = 2
"""How many the batch axis counts when a case is run."""


@dataclass(frozen=True)
class Case:
    """One node. Inputs are named by their position; those in `constants` are initializers of int64."""

    op_type: str
    inputs: tuple[Axes, ...]
    output: Axes
    kept: dict[str, object] = field(default_factory=dict)
    constants: dict[int, tuple[int, ...]] = field(default_factory=dict)
    below: dict[int, int] = field(default_factory=dict)
    """Inputs of integers, and what they are smaller than."""

    def graph(self) -> ir.Graph:
        values = [self._input(index, axes) for index, axes in enumerate(self.inputs)]
        attributes = ir.convenience.convert_attributes(self.kept)  # type: ignore[arg-type]
        node = ir.Node("", self.op_type, values, attributes=attributes)
        node.outputs[0].name = "y"
        node.outputs[0].shape = ir.Shape(self.output)
        node.outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
        given = [value for value in values if value.const_value is None]
        graph = ir.Graph(given, node.outputs, nodes=[node], opset_imports={"": 21}, name="one")
        for value in values:
            if value.const_value is not None:
                graph.register_initializer(value)
        return graph

    def _input(self, index: int, axes: Axes) -> ir.Value:
        dtype = ir.DataType.INT64 if index in self.constants or index in self.below else ir.DataType.DOUBLE
        value = ir.Value(name=str(index), shape=ir.Shape(axes), type=ir.TensorType(dtype))
        if index in self.constants:
            value.const_value = ir.tensor(np.array(self.constants[index], np.int64), name=str(index))
        return value

    def drawn(self, value: ir.Value, rng: np.random.Generator) -> NDArray[np.generic]:
        index = int(str(value.name))
        shape = [ROWS if isinstance(axis, str) else axis for axis in self.inputs[index]]
        if index in self.below:
            return rng.integers(0, self.below[index], shape)
        return rng.uniform(0.5, 2.0, shape)  # a variance must be positive


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    group, made, read = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(2, 4), min_size=1, max_size=2))
    inputs: list[Axes] = [("batch", group * read, *sizes), (group * made, read, *(2 for _ in sizes))]
    if draw(st.booleans()):
        inputs.append((group * made,))
    return Case(
        "Conv", tuple(inputs), ("batch", group * made, *(size - 1 for size in sizes)), {"group": group}
    )


@st.composite
def normalizations(draw: st.DrawFn) -> Case:
    channels, sizes = draw(st.integers(1, 4)), draw(st.lists(st.integers(1, 3), max_size=2))
    axes: Axes = ("batch", channels, *sizes)
    return Case("BatchNormalization", (axes, *[(channels,)] * 4), axes)


@st.composite
def pools(draw: st.DrawFn) -> Case:
    channels, sizes = draw(st.integers(1, 4)), draw(st.lists(st.integers(2, 4), min_size=1, max_size=2))
    op_type = draw(st.sampled_from(["MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"]))
    if op_type.startswith("Global"):
        return Case(op_type, (("batch", channels, *sizes),), ("batch", channels, *(1 for _ in sizes)))
    smaller = (size - 1 for size in sizes)
    kernel = {"kernel_shape": [2 for _ in sizes]}
    return Case(op_type, (("batch", channels, *sizes),), ("batch", channels, *smaller), kernel)


@st.composite
def flattenings(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    return Case("Flatten", (("batch", *sizes),), ("batch", int(np.prod(sizes))), {"axis": 1})


@st.composite
def means(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.integers(1, 3), min_size=2, max_size=3))
    axes: Axes = ("batch", *sizes)
    reduced = draw(st.lists(st.integers(1, len(sizes)), min_size=1, max_size=2, unique=True))
    keep = draw(st.booleans())
    output = tuple(1 if index in reduced else axis for index, axis in enumerate(axes))
    if not keep:
        output = tuple(axis for index, axis in enumerate(axes) if index not in reduced)
    written = tuple(axis - len(axes) if draw(st.booleans()) else axis for axis in reduced)
    return Case("ReduceMean", (axes, (len(reduced),)), output, {"keepdims": int(keep)}, {1: written})


@st.composite
def lookups(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    axis = draw(st.integers(-len(sizes), len(sizes) - 1))
    indices: Axes = ("batch", *draw(st.lists(st.integers(1, 3), max_size=2)))
    place = axis % len(sizes)
    output = (*sizes[:place], *indices, *sizes[place + 1 :])
    return Case("Gather", (tuple(sizes), indices), output, {"axis": axis}, below={1: sizes[place]})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    case=st.one_of(convolutions(), normalizations(), pools(), flattenings(), means(), lookups()),
    data=st.data(),
)
def test_what_is_not_needed_changes_nothing(case: Case, data: st.DataObject) -> None:
    region = tuple(_span(data, axis) for axis in case.output)
    graph = case.graph()
    needed = dependencies_of(graph.outputs[0], region).needed
    rng = np.random.default_rng(0)
    given = {str(value.name): case.drawn(value, rng) for value in graph.inputs}
    other = {}
    for value in graph.inputs:
        values = given[str(value.name)]
        free = np.ones(values.shape, bool)
        for used in needed.get(value, ()):
            free[_slices(used)] = False
        other[str(value.name)] = np.where(free, case.drawn(value, rng), values)
    evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(graph, ir_version=10)))

    (before,), (after,) = evaluator.run(None, given), evaluator.run(None, other)

    np.testing.assert_array_equal(after[_slices(region)], before[_slices(region)])


def _span(data: st.DataObject, axis: int | str) -> tuple[int, int] | None:
    if isinstance(axis, str) or data.draw(st.booleans()):
        return None
    first = data.draw(st.integers(0, axis - 1))
    return first, data.draw(st.integers(first + 1, axis))


def _slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(None) if span is None else slice(*span) for span in region or ())


IMAGE = ("batch", 6, 4, 4)
SMALLER = ("batch", 6, 2, 2)
POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}


@pytest.mark.parametrize(
    ("case", "region", "expected"),
    [
        (
            Case("Conv", (IMAGE, (4, 6, 1, 1), (4,)), ("batch", 4, 4, 4)),
            (None, (1, 2), (0, 2), None),
            [(None,) * 4, ((1, 2), None, None, None), ((1, 2),)],
        ),
        (
            Case("Conv", (IMAGE, (4, 3, 1, 1), (4,)), ("batch", 4, 4, 4), {"group": 2}),
            (None, (3, 4), None, None),
            [(None, (3, 6), None, None), ((3, 4), None, None, None), ((3, 4),)],
        ),
        (
            Case("Conv", (IMAGE, (6, 1, 1, 1)), IMAGE, {"group": 6}),
            (None, (1, 3), None, None),
            [(None, (1, 3), None, None), ((1, 3), None, None, None)],
        ),
        (
            Case("BatchNormalization", (IMAGE, *[(6,)] * 4), IMAGE),
            (None, (1, 3), (0, 1), None),
            [(None, (1, 3), (0, 1), None), *[((1, 3),)] * 4],
        ),
        (
            Case("BatchNormalization", (IMAGE, *[(6,)] * 4), IMAGE, {"training_mode": 1}),
            (None, (1, 3), (0, 1), None),
            [(None,) * 4, *[(None,)] * 4],
        ),
        *(
            (
                Case(op_type, (IMAGE,), SMALLER, POOL),
                (None, (2, 3), (0, 1), None),
                [(None, (2, 3), None, None)],
            )
            for op_type in ("MaxPool", "AveragePool")
        ),
        *(
            (
                Case(op_type, (IMAGE,), ("batch", 6, 1, 1)),
                (None, (2, 3), None, None),
                [(None, (2, 3), None, None)],
            )
            for op_type in ("GlobalMaxPool", "GlobalAveragePool")
        ),
        (Case("Flatten", (IMAGE,), ("batch", 96)), (None, (16, 48)), [(None, (1, 3), None, None)]),
        (Case("Flatten", (IMAGE,), (1, "all")), ((0, 1), None), [(None,) * 4]),
        (
            Case("ReduceMean", (IMAGE, (2,)), ("batch", 6), {"keepdims": 0}, {1: (-1, 2)}),
            (None, (2, 4)),
            [(None, (2, 4), None, None)],
        ),
        (
            Case("ReduceMean", (IMAGE, (1,)), ("batch", 1, 4, 4), {}, {1: (1,)}),
            (None, (0, 1), (2, 4), None),
            [(None, None, (2, 4), None)],
        ),
        (
            Case("Gather", ((9, 8), ("batch", 5)), ("batch", 5, 8), below={1: 9}),
            (None, (1, 2), (3, 4)),
            [(None, (3, 4)), (None, (1, 2))],
        ),
        (
            Case("Gather", (("batch", 5, 8), ()), ("batch", 8), {"axis": 1}, below={1: 5}),
            (None, (3, 4)),
            [(None, None, (3, 4)), ()],
        ),
        (
            Case("Einsum", (("batch", 4), (3, 4, 5)), ("batch", 3, 5), {"equation": "bd,kde->bke"}),
            (None, (1, 2), None),
            [(None, None), (None, None, None)],
        ),
    ],
    ids=lambda value: value.op_type if isinstance(value, Case) else "",
)
def test_a_region_of_the_output_needs_this_of_each_input(
    case: Case, region: Region, expected: list[Region]
) -> None:
    graph = case.graph()
    (node,) = graph
    needed = dependencies_of(graph.outputs[0], region).needed

    read = [value for value in node.inputs if value is not None and value.const_value is None]
    assert [set(needed[value]) for value in read] == [{found} for found in expected]


def test_reduced_axes_that_are_computed_are_any() -> None:
    graph = Case("ReduceMean", (IMAGE, (1,)), ("batch", 6, 4), {"keepdims": 0}, below={1: 4}).graph()

    assert set(dependencies_of(graph.outputs[0], (None, (1, 2), None)).needed[graph.inputs[0]]) == {
        (None,) * 4
    }


def test_a_channel_of_grouped_convolutions_needs_its_own_parameters() -> None:
    """Two branches joined, convolved in two groups, normalized and pooled: the second half is of the second."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", 1, 8]), type=ir.TensorType(ir.DataType.FLOAT))

    def op(op_type: str, inputs: list[ir.Value], *axes: int | str, **kept: object) -> ir.Value:
        attributes = ir.convenience.convert_attributes(kept)  # type: ignore[arg-type]
        value = ir.Node("", op_type, inputs, attributes=attributes).outputs[0]
        value.shape = ir.Shape(axes)
        return value

    def parameter(name: str, *axes: int) -> ir.Value:
        return ir.Value(name=name, const_value=ir.tensor(np.ones(axes, np.float32)), shape=ir.Shape(axes))

    halves = [op("Conv", [x, parameter(f"w{half}", 3, 1, 1)], "batch", 3, 8) for half in range(2)]
    joined = op("Concat", halves, "batch", 6, 8, axis=1)
    mixed = op("Conv", [joined, parameter("w", 4, 3, 1)], "batch", 4, 8, group=2)
    normal = op("BatchNormalization", [mixed, *(parameter(name, 4) for name in "abcd")], "batch", 4, 8)
    flat = op("Flatten", [op("GlobalAveragePool", [normal], "batch", 4, 1)], "batch", 4)

    assert dependencies_of(flat, (None, (2, 4))).parameters({}) == {"w1", "w", *"abcd"}
    assert dependencies_of(flat, (None, (0, 1))).parameters({}) == {"w0", "w", *"abcd"}
    assert dependencies_of(flat, (None, (1, 3))).parameters({}) == {"w0", "w1", "w", *"abcd"}

"""What linear layers and convolutions read and give ranges over, measured on the joint graph with calibration rows.

Values that only differ in how they are laid out share one range: what a Split takes apart, what a Concat
puts together, what the layers of one group give. So a value that leaves one layer and enters the next is
quantized once, and a layer has the scales of its stack in every graph, whether it is stacked there or not.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from te_export.bundle.graph_file import WEIGHTS_NAME, linked_bytes
from te_export.bundle.weights_file import plan_weights, weight_chunks
from te_export.errors import OutputError, UsageError
from te_export.precision.layers import weight_names
from te_export.precision.static.conv_layers import ConvLayer, plan_layers
from te_export.precision.static.convolutions import Convolution, convolutions
from te_export.rewrite.edit import axes_of
from te_export.rewrite.row_axis import elements_per_row
from te_runtime.threads import default_threads

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["ActivationRanges", "LayerRange", "Range", "measure_ranges"]

_BATCH_ROWS = 64
_BATCH_NUMBERS = 2**26
"""Of all values that are looked at together: 256 MiB of float32."""
_GRAPH_NAME = "ranges.onnx"
_LAID_OUT_ANEW = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Split"})


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, zero included."""

    low: float
    high: float

    def __or__(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True)
class LayerRange:
    """What one layer reads and gives.

    Attributes:
        output: after a Relu, before any other activation.
        together: the weights it is stacked with in the joint graph, itself included.
    """

    input: Range
    output: Range
    together: tuple[str, ...]


@dataclass(frozen=True)
class ActivationRanges:
    """The ranges of every layer that can be converted, by the name of its weight, as `weight_names` gives it."""

    layers: Mapping[str, LayerRange]


def measure_ranges(
    joint: ir.Model, rows: Mapping[str, NDArray[np.generic]], scratch: Path
) -> ActivationRanges:
    """Run the float32 joint graph over calibration rows.

    Args:
        joint: stays as it is.
        rows: (N, …) for each input, by name.
        scratch: a folder for the graph and its weights while it runs; what is left in it is of no use.

    Raises:
        UsageError: there are no rows, or a row leads to a value that is not finite.
        OutputError: the graph cannot be written to `scratch`.
    """
    layers = plan_layers(joint.graph)
    convs = list(convolutions(joint.graph))
    classes = _classes(joint.graph, layers, convs)
    ranges: dict[ir.Value, Range] = {}
    for value, found in _observe(joint, rows, _watched(layers, convs), scratch).items():
        first = classes.first(value)
        ranges[first] = ranges.get(first, found) | found
    of_convs = {
        conv.name: LayerRange(ranges[classes.first(conv.x)], ranges[classes.first(conv.output)], (conv.name,))
        for conv in convs
    }
    return ActivationRanges(
        of_convs
        | {
            name: LayerRange(ranges[classes.first(linear.x)], ranges[classes.first(output)], names)
            for layer in layers
            for linear, output in zip(layer.linears, layer.quantized_outputs, strict=True)
            for names in [weight_names(linear)]
            for name in names
        }
    )


class _Classes:
    """Sets of values that share a range."""

    def __init__(self) -> None:
        self._parents: dict[ir.Value, ir.Value] = {}

    def first(self, value: ir.Value) -> ir.Value:
        """The value that stands for the set that `value` is in."""
        while value in self._parents:
            value = self._parents[value]
        return value

    def join(self, values: Iterable[ir.Value]) -> None:
        first, *others = dict.fromkeys(self.first(value) for value in values)
        self._parents.update(dict.fromkeys(others, first))


def _classes(graph: ir.Graph, layers: Sequence[ConvLayer], convs: Sequence[Convolution]) -> _Classes:
    classes = _Classes()
    for layer in layers:
        for values in (layer.inputs, layer.quantized_outputs, layer.outputs):
            classes.join(values)
    _join_shared_weights(classes, layers, convs)
    given = {value for layer in layers for value in layer.quantized_outputs}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type in _LAID_OUT_ANEW:
            inputs = inputs[:1]
        elif node.op_type != "Concat" or not given.issuperset(inputs):
            continue
        classes.join([*inputs, *node.outputs])
        if given.issuperset(inputs):
            given.update(node.outputs)
    return classes


def _join_shared_weights(
    classes: _Classes, layers: Sequence[ConvLayer], convs: Sequence[Convolution]
) -> None:
    """Layers that share a weight share its scales."""
    users: dict[str, list[tuple[ir.Value, ir.Value]]] = {}
    for conv in convs:
        users.setdefault(conv.name, []).append((conv.x, conv.output))
    for layer in layers:
        for linear, output in zip(layer.linears, layer.quantized_outputs, strict=True):
            for name in weight_names(linear):
                users.setdefault(name, []).append((linear.x, output))
    for uses in users.values():
        for values in zip(*uses, strict=True):
            classes.join(values)


def _watched(layers: Sequence[ConvLayer], convs: Sequence[Convolution]) -> list[ir.Value]:
    values = [value for layer in layers for value in (*layer.inputs, *layer.quantized_outputs)]
    values += [value for conv in convs for value in (conv.x, conv.output)]
    return list(dict.fromkeys(values))


def _observe(
    joint: ir.Model, rows: Mapping[str, NDArray[np.generic]], watched: Sequence[ir.Value], scratch: Path
) -> dict[ir.Value, Range]:
    """The range of each value over all rows."""
    by_name = {str(value.name): value for value in watched}
    ranges: dict[ir.Value, Range] = {}
    session = _session(
        joint, [name for name, value in by_name.items() if not value.is_graph_input()], scratch
    )
    for start, feed in _batches(rows, _rows_at_once(watched)):
        names = [output.name for output in session.get_outputs() if output.name in by_name]
        found = dict(zip(names, session.run(names, feed), strict=True)) if names else {}
        for name, values in (feed | found).items():
            value = by_name.get(name)
            if value is not None:  # layers read and give floats
                span = _span(name, values, start)
                ranges[value] = ranges.get(value, span) | span
    del session
    gc.collect()  # the session maps the weights file, which the caller is to remove
    return ranges


def _rows_at_once(watched: Iterable[ir.Value]) -> int:
    """How many rows are run together: fewer where a row has large images."""
    shapes = [axes_of(value) or () for value in watched]
    per_row = sum(math.prod(map(elements_per_row, axes)) for axes in shapes)
    return max(1, min(_BATCH_ROWS, _BATCH_NUMBERS // max(1, per_row)))


def _batches(
    rows: Mapping[str, NDArray[np.generic]], count: int
) -> Iterator[tuple[int, dict[str, NDArray[np.generic]]]]:
    lengths = {len(values) for values in rows.values()}
    if len(lengths) != 1 or lengths == {0}:
        found = ", ".join(f"{name}: {len(values)}" for name, values in rows.items())
        raise UsageError(
            f"the calibration data has {found or 'no'} rows, expected at least one, as many for each input"
        )
    for start in range(0, lengths.pop(), count):
        yield start, {name: values[start : start + count] for name, values in rows.items()}


def _span(name: str, values: NDArray[np.generic], start: int) -> Range:
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    if not (np.isfinite(low) and np.isfinite(high)):
        finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        raise UsageError(
            f"the calibration data leads to a value that is not finite: {name} in row "
            f"{start + int(finite.argmin())}, counted from 0. Leave such rows out."
        )
    return Range(low, high)


def _session(joint: ir.Model, names: Sequence[str], scratch: Path) -> onnxruntime.InferenceSession:
    """The graph, opened, with the values of these names among its outputs."""
    import onnxruntime

    model = joint.clone()
    outputs = {value.name for value in model.graph.outputs}
    made = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(made[name] for name in names if name not in outputs)
    _write(model, scratch)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = default_threads()
    options.log_severity_level = 3
    path = str(scratch / _GRAPH_NAME)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _write(model: ir.Model, scratch: Path) -> None:
    layout = plan_weights([model.graph])
    try:
        with (scratch / WEIGHTS_NAME).open("wb") as file:
            for chunk in weight_chunks(layout):
                file.write(chunk)
        (scratch / _GRAPH_NAME).write_bytes(linked_bytes(model, layout))
    except OSError as error:
        raise OutputError(
            f"the calibration graph ({layout.size_bytes:,} bytes) could not be written to {scratch}: "
            f"{error.strerror or error}. Free some space, or choose another folder with -o DIR."
        ) from error

"""Rules for the operators of convolutional networks, which keep channels apart or mix them in known groups.

The channel axis is the second; along the axes after it, the spatial ones, everything is taken.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from te_export.verify.regions import Needs, Region, Rule, Span, integer_of, sizes_of

__all__ = ["CHANNEL_RULES"]


def _conv(node: ir.Node, _output: ir.Value, region: tuple[Span, ...]) -> Needs | None:
    """Output channels of one group are made of the input channels of that group."""
    data, weight = sizes_of(node.inputs[0]), sizes_of(node.inputs[1])
    if data is None or weight is None:
        return None
    rows, channels = region[:2]
    read = _of_groups(channels, groups=integer_of(node, "group", 1), made=weight[0], read=data[1])
    needs: list[tuple[ir.Value | None, Region]] = [
        (node.inputs[0], (rows, read, *_whole(data[2:]))),
        (node.inputs[1], (channels, *_whole(weight[1:]))),
    ]
    return needs + [(bias, (channels,)) for bias in node.inputs[2:]]


def _of_groups(channels: Span, *, groups: int, made: int | None, read: int | None) -> Span:
    """The input channels of the groups that hold these output channels."""
    if channels is None or made is None or read is None:
        return None
    size = made // groups
    first, last = channels[0] // size, (channels[1] - 1) // size
    return first * read // groups, (last + 1) * read // groups


def _batch_norm(node: ir.Node, output: ir.Value, region: tuple[Span, ...]) -> Needs | None:
    """In inference every element is treated by itself; in training by the statistics of all rows."""
    if integer_of(node, "training_mode", 0) or output is not node.outputs[0] or len(region) < 2:
        return None
    return [(node.inputs[0], region), *((value, (region[1],)) for value in node.inputs[1:])]


def _pool(node: ir.Node, _output: ir.Value, region: tuple[Span, ...]) -> Needs:
    rows, channels = region[:2]
    return [(node.inputs[0], (rows, channels, *_whole(region[2:])))]


def _reduce(node: ir.Node, _output: ir.Value, region: tuple[Span, ...]) -> Needs | None:
    """What is reduced is taken whole, what is kept as it is."""
    data, axes, *_ = (*node.inputs, None)
    sizes, tensor = sizes_of(data), None if axes is None else ir.convenience.get_const_tensor(axes)
    if sizes is None or tensor is None or tensor.size == 0:
        return None
    reduced = {int(axis) % len(sizes) for axis in tensor.numpy()}
    spans = list(region)
    if not integer_of(node, "keepdims", 1):
        for axis in sorted(reduced):
            spans.insert(axis, None)
    return [(data, tuple(None if axis in reduced else span for axis, span in enumerate(spans))), (axes, None)]


def _gather(node: ir.Node, _output: ir.Value, region: tuple[Span, ...]) -> Needs | None:
    """Any entry along the axis may be the one that is looked up; of each, only what is asked for."""
    data, indices = (sizes_of(value) for value in node.inputs)
    if data is None or indices is None:
        return None
    axis = integer_of(node, "axis", 0) % len(data)
    end = axis + len(indices)
    return [(node.inputs[0], (*region[:axis], None, *region[end:])), (node.inputs[1], region[axis:end])]


def _whole(axes: list[int | None] | tuple[Span, ...]) -> tuple[Span, ...]:
    return (None,) * len(axes)


CHANNEL_RULES: Mapping[str, Rule] = {
    "Conv": _conv,
    "BatchNormalization": _batch_norm,
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"), _pool),
    "ReduceMean": _reduce,
    "Gather": _gather,
}

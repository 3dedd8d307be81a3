"""What a value depends on, piece by piece: which rows of a stacked weight, which slice of a shared node.

After rewriting, one node may hold the gates of all tasks, so "is an ancestor of" says nothing. Here regions
are followed upwards: a region is a span of indices for each axis, and every operator that a rewrite writes
maps the region asked of its output to the regions of its inputs that it is made of; so do the operators of
convolutional networks (channel_rules.py). For any other operator the answer is all of every input, which is never
too little.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from te_export.rewrite.linear import ACTIVATIONS
from te_export.rewrite.stack import stack_of
from te_export.verify.channel_rules import CHANNEL_RULES
from te_export.verify.regions import Needs, Region, Rule, Sizes, Span, integer_of, sizes_of

__all__ = ["Dependencies", "Region", "dependencies_of"]


@dataclass(frozen=True)
class Dependencies:
    """Everything one region of one value depends on.

    Attributes:
        needed: every value on the way, itself included, with the regions of it that are used.
    """

    needed: Mapping[ir.Value, frozenset[Region]]

    @property
    def nodes(self) -> dict[ir.Node, None]:
        """The nodes that make the values, as an ordered set."""
        producers = (value.producer() for value in self.needed)
        return {node: None for node in producers if node is not None}

    def parameters(self, sources: Mapping[str, tuple[str, ...]]) -> set[str]:
        """Names of the parameters in the initializers that are used; integers, such as shapes, are none.

        Args:
            sources: for initializers that a rewrite made, the parameters in each.
        """
        return {
            parameter
            for value, regions in self.needed.items()
            if value.const_value is not None and not value.const_value.dtype.is_integer()
            for region in regions
            for name in _used_names(value, region)
            for parameter in sources.get(name, (name,))
        }


def dependencies_of(value: ir.Value, region: Region = None) -> Dependencies:
    """Follow `region` of `value` up to the graph's inputs and initializers."""
    needed: dict[ir.Value, set[Region]] = {}
    waiting: list[tuple[ir.Value, Region]] = [(value, _normal(value, region))]
    while waiting:
        current, wanted = waiting.pop()
        regions = needed.setdefault(current, set())
        if wanted in regions:
            continue
        regions.add(wanted)
        node = current.producer()
        if node is not None:
            needs = _needs(node, current, wanted)
            waiting += [(source, _normal(source, part)) for source, part in needs if source is not None]
    return Dependencies({current: frozenset(regions) for current, regions in needed.items()})


def _used_names(value: ir.Value, region: Region) -> Iterable[str]:
    """The initializer's own name, or the names of those parts of a stack that the region meets."""
    stack = stack_of(value.const_value)
    if stack is None:
        yield str(value.name)
        return
    span = region[0] if region is not None else None
    first, last = span or (0, stack.axes[0])
    row = math.prod(stack.axes[1:])
    begin = 0
    for part in stack.parts:
        end = begin + part.tensor.size
        if begin < last * row and first * row < end:
            yield part.name
        begin = end


def _needs(node: ir.Node, output: ir.Value, region: Region) -> Needs:
    everything = [(value, None) for value in node.inputs]
    rule = _RULES.get(node.op_type)
    if (
        region is None
        or rule is None
        or any(sizes_of(value) is None for value in node.inputs if value is not None)
    ):
        return everything
    found = rule(node, output, region)
    return everything if found is None else found


def _normal(value: ir.Value, region: Region) -> Region:
    """Spans of a whole axis, and of the batch axis, become None, so that equal regions are equal."""
    sizes = sizes_of(value)
    if sizes is None:
        return None
    if region is None:
        return (None,) * len(sizes)
    return tuple(
        None if size is None or span is None or span == (0, size) else span
        for size, span in zip(sizes, region, strict=True)
    )


def _same(node: ir.Node, _output: ir.Value, region: tuple[Span, ...]) -> Needs:
    return [(node.inputs[0], region)]


def _elementwise(node: ir.Node, output: ir.Value, region: tuple[Span, ...]) -> Needs:
    return [(value, _broadcast(sizes_of(value), sizes_of(output), region)) for value in node.inputs]


def _broadcast(sizes: Sizes | None, out: Sizes | None, region: Sequence[Span]) -> Region:
    """The region of an input that is broadcast, axes aligned at the last."""
    if sizes is None or out is None:
        return None
    offset = len(region) - len(sizes)
    return tuple(
        None if size == 1 and out[offset + axis] != 1 else region[offset + axis]
        for axis, size in enumerate(sizes)
    )


def _gemm(node: ir.Node, _output: ir.Value, region: tuple[Span, ...]) -> Needs | None:
    if integer_of(node, "transA", 0):
        return None
    rows, columns = region
    weight = (columns, None) if integer_of(node, "transB", 0) else (None, columns)
    needs: list[tuple[ir.Value | None, Region]] = [(node.inputs[0], (rows, None)), (node.inputs[1], weight)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        sizes = sizes_of(node.inputs[2]) or []
        needs.append((node.inputs[2], (columns,) if len(sizes) == 1 and sizes[0] != 1 else None))
    return needs


def _matmul(node: ir.Node, output: ir.Value, region: tuple[Span, ...]) -> Needs | None:
    left, right, out = (sizes_of(value) for value in (node.inputs[0], node.inputs[1], output))
    if left is None or right is None or out is None or len(left) < 2 or len(right) < 2:
        return None
    *_, rows, columns = region
    outer = region[:-2]
    a, b = (_broadcast(sizes[:-2], out[:-2], outer) for sizes in (left, right))
    return [(node.inputs[0], (*(a or ()), rows, None)), (node.inputs[1], (*(b or ()), None, columns))]


def _softmax(node: ir.Node, _output: ir.Value, region: tuple[Span, ...]) -> Needs:
    axis = integer_of(node, "axis", -1) % len(region)
    return [(node.inputs[0], (*region[:axis], None, *region[axis + 1 :]))]


def _split(node: ir.Node, output: ir.Value, region: tuple[Span, ...]) -> Needs | None:
    axis = integer_of(node, "axis", 0) % len(region)
    begin = 0
    for value in node.outputs:
        size = (sizes_of(value) or [None] * len(region))[axis]
        if size is None:
            return None
        if value is output:
            first, last = region[axis] or (0, size)
            span = (begin + first, begin + last)
            return [(node.inputs[0], (*region[:axis], span, *region[axis + 1 :]))]
        begin += size
    return None


def _concat(node: ir.Node, output: ir.Value, region: tuple[Span, ...]) -> Needs | None:
    axis = integer_of(node, "axis", 0) % len(region)
    total = (sizes_of(output) or [None] * len(region))[axis]
    if total is None:
        return None
    first, last = region[axis] or (0, total)
    needs: list[tuple[ir.Value | None, Region]] = []
    begin = 0
    for value in node.inputs:
        size = (sizes_of(value) or [None] * len(region))[axis]
        if size is None:
            return None
        span = (max(first - begin, 0), min(last - begin, size))
        if span[0] < span[1]:
            needs.append((value, (*region[:axis], span, *region[axis + 1 :])))
        begin += size
    return needs


def _transpose(node: ir.Node, _output: ir.Value, region: tuple[Span, ...]) -> Needs:
    attribute = node.attributes.get("perm")
    perm = list(attribute.as_ints()) if attribute is not None else list(range(len(region)))[::-1]
    spans: list[Span] = [None] * len(region)
    for axis, origin in enumerate(perm):
        spans[origin] = region[axis]
    return [(node.inputs[0], tuple(spans))]


def _reshape(node: ir.Node, output: ir.Value, region: tuple[Span, ...]) -> Needs | None:
    before, after = sizes_of(node.inputs[0]), sizes_of(output)
    groups = _aligned(before, after) if before is not None and after is not None else None
    if before is None or after is None or groups is None:
        return None
    spans: list[Span] = []
    for old, new in groups:
        sizes = [after[axis] for axis in new]
        whole = all(region[axis] is None for axis in new)
        if whole or None in sizes:
            spans += [None] * len(old)
        else:
            known = [size for size in sizes if size is not None]
            flat = _flatten([region[axis] for axis in new], known)
            spans += _unflatten(flat, [before[axis] or 1 for axis in old])
    return [(node.inputs[0], tuple(spans)), *((value, None) for value in node.inputs[1:])]


def _aligned(before: Sizes, after: Sizes) -> list[tuple[list[int], list[int]]] | None:
    """Groups of neighbouring axes of both shapes that hold the same elements; the batch axis by itself."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(old), j + len(new)
        while (a := _product(before, old)) != (b := _product(after, new)):
            if a is None or b is None:
                return None
            if a < b and i < len(before):
                old.append(i)
                i += 1
            elif b < a and j < len(after):
                new.append(j)
                j += 1
            else:
                return None
        groups.append((old, new))
    return groups


def _product(sizes: Sizes, axes: Sequence[int]) -> int | None:
    """Elements of the axes; None for the batch axis alone; -1, which nothing equals, where it is mixed in."""
    if any(sizes[axis] is None for axis in axes):
        return None if len(axes) == 1 else -1
    return math.prod(sizes[axis] or 1 for axis in axes)


def _flatten(spans: Sequence[Span], sizes: Sequence[int]) -> tuple[int, int]:
    """The smallest span of the flattened axes that holds the region."""
    first = last = 0
    for span, size in zip(spans, sizes, strict=True):
        low, high = span or (0, size)
        first, last = first * size + low, last * size + high - 1
    return first, last + 1


def _unflatten(flat: tuple[int, int], sizes: Sequence[int]) -> list[Span]:
    """The smallest region of axes of these sizes that holds a span of them flattened."""
    low, high = flat[0], flat[1] - 1
    spans: list[Span] = []
    same = True
    for axis, size in enumerate(sizes):
        stride = math.prod(sizes[axis + 1 :])
        first, low = divmod(low, stride)
        last, high = divmod(high, stride)
        spans.append((first, last + 1) if same else (0, size))
        same = same and first == last
    return spans


_RULES: Mapping[str, Rule] = {
    **CHANNEL_RULES,
    **dict.fromkeys((*ACTIVATIONS, "Identity", "Cast"), _same),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _elementwise),
    **dict.fromkeys(("Reshape", "Flatten", "Unsqueeze", "Squeeze"), _reshape),
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Softmax": _softmax,
    "Split": _split,
    "Concat": _concat,
    "Transpose": _transpose,
}

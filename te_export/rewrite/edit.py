"""Putting nodes and constants into a graph: unique names, known shapes, and a sorted graph at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

__all__ = ["Axes", "Edit", "axes_of", "joined_name"]

Axes = tuple[int | str, ...]
"""A shape; the batch axis is its symbolic name."""


class Edit:
    """One change of one graph. New nodes are appended; `done` sorts them in and drops what nothing reads."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        self._taken = {value.name for value in values} | {node.name for node in graph}

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        axes: Axes,
        *,
        name: str,
        domain: str = "",
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: int | list[int],
    ) -> ir.Value:
        """Add a node of one output of shape `axes`."""
        (value,) = self.add_many(op_type, inputs, [axes], name=name, domain=domain, dtype=dtype, **attributes)
        return value

    def add_many(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shapes: Sequence[Axes],
        *,
        name: str,
        domain: str = "",
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: int | list[int],
    ) -> list[ir.Value]:
        """Add a node with one output of `dtype` for each of `shapes`."""
        node = ir.Node(
            domain,
            op_type,
            inputs,
            attributes=ir.convenience.convert_attributes(attributes),
            num_outputs=len(shapes),
            name=self._unique(name),
        )
        for index, (value, axes) in enumerate(zip(node.outputs, shapes, strict=True)):
            value.name = self._unique(f"{name}.out" if len(shapes) == 1 else f"{name}.{index}")
            value.shape = ir.Shape(axes)
            value.type = ir.TensorType(dtype)
        self._graph.append(node)
        return list(node.outputs)

    def like(self, node: ir.Node, x: ir.Value, *, name: str) -> ir.Value:
        """The activation `node` again, of `x`."""
        attributes = [ir.Attr(attr.name, attr.type, attr.value) for attr in node.attributes.values()]
        new = ir.Node("", node.op_type, [x], attributes=attributes, name=self._unique(name))
        new.outputs[0].name = self._unique(f"{name}.out")
        new.outputs[0].shape = ir.Shape(axes_of(x) or ())
        new.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        self._graph.append(new)
        return new.outputs[0]

    def again(self, node: ir.Node, inputs: Sequence[ir.Value | None], *, name: str) -> ir.Value:
        """The operator `node` of one output again, with its attributes, of other inputs of the same shapes."""
        attributes = [ir.Attr(attr.name, attr.type, attr.value) for attr in node.attributes.values()]
        new = ir.Node(node.domain, node.op_type, inputs, attributes=attributes, name=self._unique(name))
        before, after = node.outputs[0], new.outputs[0]
        after.name = self._unique(f"{name}.out")
        after.shape = None if before.shape is None else ir.Shape(before.shape)
        after.type = before.type
        self._graph.append(new)
        return after

    def integers(self, values: Iterable[int], *, name: str) -> ir.Value:
        """A constant of int64."""
        array = np.asarray(tuple(values), np.int64)
        return self.initializer(ir.tensor(array), name=name)

    def initializer(self, tensor: ir.TensorProtocol, *, name: str) -> ir.Value:
        """A new initializer, named `name` or, where that is taken, something near it."""
        tensor.name = self._unique(name)
        value = ir.Value(name=tensor.name, const_value=tensor)
        value.shape = ir.Shape(tuple(tensor.shape.numpy()))
        value.type = ir.TensorType(tensor.dtype)
        self._graph.register_initializer(value)
        return value

    def split(self, x: ir.Value, sizes: Sequence[int], *, batch: int | str, name: str) -> list[ir.Value]:
        """`x` (B, Σ sizes) in pieces (B, sizes[i])."""
        lengths = self.integers(sizes, name=f"{name}.sizes")
        return self.add_many("Split", [x, lengths], [(batch, size) for size in sizes], name=name, axis=1)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every reader of `old`, and the graph's outputs, read `new`, which takes over an output's name."""
        is_output = old.is_graph_output()
        name = old.name
        if is_output and (new.is_graph_output() or new.producer() is None):  # it has a name to keep
            new = self.add("Identity", [new], axes_of(old) or (), name=f"{name}.again")
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        if is_output:
            old.name = self._unique(f"{name}.before")
            new.name = name

    def done(self) -> None:
        """Drop what no output depends on, and sort."""
        drop_unread(self._graph)
        self._graph.sort()

    def _unique(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self._taken:
            count += 1
            candidate = f"{name}#{count}"
        self._taken.add(candidate)
        return candidate


def drop_unread(graph: ir.Graph) -> None:
    """Remove nodes and initializers that no output depends on."""
    needed: set[ir.Node] = set()
    waiting = [value.producer() for value in graph.outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in needed:
            continue
        needed.add(node)
        waiting += [value.producer() for value in node.inputs if value is not None]
    graph.remove([node for node in graph if node not in needed], safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def axes_of(value: ir.Value | None) -> Axes | None:
    """The shape of a value, with the name of a symbolic axis; None where an axis is not known."""
    if value is None or value.shape is None:
        return None
    axes: list[int | str] = []
    for axis in value.shape:
        known = axis if isinstance(axis, int) else axis.value
        if known is None:
            return None
        axes.append(known)
    return tuple(axes)


def joined_name(names: Sequence[str]) -> str:
    """`first+n` for a name and n more, or the one name there is."""
    return names[0] if len(names) == 1 else f"{names[0]}+{len(names) - 1}"

"""A task that is one column of a fused output depends on what makes that column, and on no more.

Columns are pulled back through the operators that made them:

    slice(cat(y_0, y_1, …), t)                    y_t
    slice(f(y), t), f elementwise                 f(slice(y, t))
    slice(linear(x, W, b), t)                     linear(x, W[t], b[t])
    slice(squeeze / unsqueeze / stack …, t)       the same of the slice

until nothing above can be narrowed: there the slice stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

from te_export.modules.trace import Traced, batch_axis

__all__ = ["Narrowed", "narrow_columns"]

_aten = torch.ops.aten
_ELEMENTWISE = frozenset(
    {
        _aten.relu.default, _aten.sigmoid.default, _aten.tanh.default, _aten.exp.default, _aten.softplus.default,
        _aten.gelu.default, _aten.silu.default, _aten.leaky_relu.default, _aten.elu.default, _aten.neg.default,
        _aten.clone.default, _aten.abs.default, _aten.sqrt.default, _aten.log.default, _aten.clamp.default,
        _aten.hardtanh.default, _aten.dropout.default, _aten.alias.default, _aten.log1p.default,
        _aten.pow.Tensor_Scalar, _aten._to_copy.default, _aten.logit.default,
    }
)  # fmt: skip
_BROADCAST = frozenset(
    {_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.rsub.Scalar, _aten.maximum.default,
     _aten.minimum.default}
)  # fmt: skip


_SPLITS = frozenset({_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default})


@dataclass(frozen=True)
class Narrowed:
    """What was pulled apart.

    Attributes:
        slices: how many pieces no longer read what they were cut from.
        sources: by the name of a parameter that is some rows of another, that other.
    """

    slices: int
    sources: dict[str, str]


def narrow_columns(traced: Traced) -> Narrowed:
    """Narrow every piece of columns whose task can do without the others, in place, and the program's state with it."""
    work = _Narrowing(traced)
    served, outputs = _served(traced), set(traced.outputs())
    done = 0
    for node in reversed(list(traced.graph.nodes)):
        piece = _piece_of(node) if served.get(node) else None
        if piece is None or batch_axis(piece.source) == piece.axis:
            continue
        if served[piece.source] == served[node] and len(piece.cut.users) > 1 and node not in outputs:
            continue  # the same tasks need the other columns too, as of experts that one wide layer makes
        with traced.graph.inserting_before(node):
            narrowed = work.narrow(piece.source, piece.axis, piece.start, piece.end)
            if narrowed is not None:
                node.replace_all_uses_with(
                    work.without_axis(narrowed, piece.axis) if piece.drops_axis else narrowed
                )
                done += 1
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.program.graph_module.recompile()
    return Narrowed(done, work.sources)


@dataclass(frozen=True)
class _Piece:
    """Part of a value along an axis, which it keeps or, of length 1, drops.

    Attributes:
        cut: whose readers take the pieces: the value, or what splits it.
    """

    source: Node
    cut: Node
    axis: int
    start: int
    end: int
    drops_axis: bool = False


def _served(traced: Traced) -> dict[Node, int]:
    """For each node, a bit mask of the outputs that depend on it."""
    served: dict[Node, int] = {}
    for index, output in enumerate(traced.outputs()):
        served[output] = served.get(output, 0) | 1 << index
    for node in reversed(traced.graph.nodes):
        for source in node.all_input_nodes:
            if node.op != "output":
                served[source] = served.get(source, 0) | served.get(node, 0)
    return served


def _piece_of(node: Node) -> _Piece | None:
    """What a node takes a piece of; None where it takes none, or not plainly."""
    given: list[Any] = [*node.args]
    if node.target is _aten.slice.Tensor:
        source, axis, start, end = _slice_of(node)
        return None if axis is None else _Piece(source, source, axis, start, end)
    if node.target is _aten.select.int:
        return _entry(given[0], given[0], given[1], given[2])
    if getattr(node.target, "__name__", "") != "getitem" or not isinstance(given[0], Node):
        return None
    whole, index = given[0], given[1]
    arguments: list[Any] = [*whole.args]
    if whole.target is _aten.unbind.int:
        return _entry(arguments[0], whole, arguments[1] if len(arguments) > 1 else 0, index)
    if whole.target not in _SPLITS:
        return None
    source, axis = arguments[0], arguments[2] if len(arguments) > 2 else 0
    axis %= len(_shape(source))
    sizes = [part.shape[axis] for part in whole.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    start = sum(sizes[:index])
    return _Piece(source, whole, axis, start, start + sizes[index])


def _entry(source: Node, cut: Node, axis: int, index: int) -> _Piece | None:
    axis %= len(_shape(source))
    size = _shape(source)[axis]
    if not isinstance(size, int):
        return None
    return _Piece(source, cut, axis, index % size, index % size + 1, drops_axis=True)


def _shape(node: Node) -> list[object]:
    value = node.meta.get("val")
    return list(value.shape) if isinstance(value, Tensor) else []


def _slice_of(node: Node) -> tuple[Node, int | None, int, int]:
    """What is sliced, along which axis, from where to where; without an axis where that is not plain."""
    given: list[Any] = [*node.args]
    given += [0, None, None, 1][len(given) - 1 :]
    source, axis, start, end, step = given
    size = _shape(source)[axis]
    if step != 1 or not isinstance(size, int):
        return source, None, 0, 0
    first, last, _ = slice(start, end).indices(size)
    return source, axis % len(_shape(source)), first, max(first, last)


class _Narrowing:
    def __init__(self, traced: Traced) -> None:
        self._traced = traced
        self._graph = traced.graph
        self._parameters = traced.parameter_names()
        self.sources: dict[str, str] = {}
        self._made: dict[tuple[str, int, int], Node] = {}
        self._rules: dict[object, Callable[[Node, int, int, int], Node | None]] = {
            _aten.cat.default: self._cat,
            _aten.stack.default: self._stack,
            _aten.linear.default: self._linear,
            _aten.squeeze.dim: self._squeeze,
            _aten.unsqueeze.default: self._unsqueeze,
            _aten.slice.Tensor: self._slice,
            **dict.fromkeys(_ELEMENTWISE, self._elementwise),
            **dict.fromkeys(_BROADCAST, self._broadcast),
        }

    def narrow(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        """A node that computes `node` from `start` to before `end` along `axis` of less than all of it; None where
        there is none.
        """
        if (start, end) == (0, _shape(node)[axis]):
            return node
        rule = self._rules.get(node.target) if node.op == "call_function" else None
        return rule(node, axis, start, end) if rule is not None else None

    def without_axis(self, node: Node, axis: int) -> Node:
        """The same without an axis of length 1."""
        return self._call(_aten.squeeze.dim, (node, axis), node)

    def _cut(self, node: Node, axis: int, start: int, end: int) -> Node:
        """As narrow, with a slice where nothing better is found."""
        return self.narrow(node, axis, start, end) or self._call(
            _aten.slice.Tensor, (node, axis, start, end), node
        )

    def _call(self, target: Any, args: tuple[Any, ...], like: Node) -> Node:
        made = self._graph.call_function(target, args)
        made.meta.update(
            {key: like.meta[key] for key in ("stack_trace", "nn_module_stack") if key in like.meta}
        )
        values = torch.fx.node.map_arg(args, lambda node: node.meta["val"])
        made.meta["val"] = target(*values)
        return made

    def _cat(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        parts, over = self._joined(node)
        rank = len(_shape(node))
        if over % rank != axis:
            return self._call(
                node.target, ([self._cut(part, axis, start, end) for part in parts], over), node
            )
        kept: list[Node] = []
        begin = 0
        for part in parts:
            size = _shape(part)[axis]
            if not isinstance(size, int):
                return None
            low, high = max(start - begin, 0), min(end - begin, size)
            if low < high:
                kept.append(self._cut(part, axis, low, high))
            begin += size
        return kept[0] if len(kept) == 1 else self._call(node.target, (kept, over), node)

    def _stack(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        parts, over = self._joined(node)
        if over % len(_shape(node)) != axis:
            return None
        return self._call(node.target, (parts[start:end], over), node)

    @staticmethod
    def _joined(node: Node) -> tuple[list[Node], int]:
        given: list[Any] = [*node.args]
        return list(given[0]), given[1] if len(given) > 1 else 0

    def _linear(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        x, weight, bias = (*node.args, None)[:3]
        if axis != len(_shape(node)) - 1 or not isinstance(weight, Node) or weight not in self._parameters:
            return None
        rows: list[object] = [x, self._rows_of(weight, start, end)]
        if isinstance(bias, Node):
            if bias not in self._parameters:
                return None
            rows.append(self._rows_of(bias, start, end))
        return self._call(node.target, tuple(rows), node)

    def _squeeze(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        source, gone = node.args
        if not isinstance(source, Node) or not isinstance(gone, int):
            return None
        if len(_shape(node)) == len(_shape(source)):  # the axis was longer than one, and stayed
            return self.narrow(source, axis, start, end)
        gone %= len(_shape(source))
        inner = self.narrow(source, axis + (axis >= gone), start, end)
        return None if inner is None else self._call(node.target, (inner, gone), node)

    def _unsqueeze(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        source, added = node.args
        if not isinstance(source, Node) or not isinstance(added, int):
            return None
        added %= len(_shape(node))
        if added == axis:
            return None
        inner = self.narrow(source, axis - (axis > added), start, end)
        return None if inner is None else self._call(node.target, (inner, added), node)

    def _slice(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        source, along, begin, _ = _slice_of(node)
        if along == axis:
            return self._cut(source, axis, begin + start, begin + end)
        whole = str(_shape(node)[0]) == str(_shape(source)[0])
        if node.args[1] == 0 and whole:  # x[:, a:b] first takes all of the batch
            return self.narrow(source, axis, start, end)
        return None

    def _elementwise(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        source, *others = node.args
        inner = self.narrow(source, axis, start, end) if isinstance(source, Node) else None
        if inner is None or any(isinstance(other, Node) for other in others) or (others and node.kwargs):
            return None
        if node.kwargs:
            target: Any = node.target
            made = self._graph.call_function(target, (inner,), dict(node.kwargs))
            made.meta.update(node.meta)
            made.meta["val"] = target(inner.meta["val"], **node.kwargs)
            return made
        return self._call(node.target, (inner, *others), node)

    def _broadcast(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        if node.kwargs:
            return None
        made: list[Any] = []
        rank, found = len(_shape(node)), False
        for operand in node.args:
            if not isinstance(operand, Node):
                made.append(operand)
                continue
            shape = _shape(operand)
            place = axis - (rank - len(shape))
            if place < 0 or shape[place] == 1:
                made.append(operand)
            elif operand in self._parameters and place == 0:
                made.append(self._rows_of(operand, start, end))
                found = True
            else:
                inner = self.narrow(operand, place, start, end)
                found = found or inner is not None
                made.append(inner or self._cut(operand, place, start, end))
        return self._call(node.target, tuple(made), node) if found else None

    def _rows_of(self, parameter: Node, start: int, end: int) -> Node:
        """Rows of a parameter, as a parameter of its own that shares its memory."""
        name = self._parameters[parameter]
        key = (name, start, end)
        if key in self._made:
            return self._made[key]
        own = f"{name}_rows_{start}_{end}"  # torch looks a dot up as an attribute of the tensor
        program = self._traced.program
        with self._graph.inserting_after(parameter):
            node = self._graph.placeholder(f"{parameter.name}_rows_{start}_{end}")
        node.meta["val"] = parameter.meta["val"][start:end]
        part = self._traced.tensor(name).detach()[start:end]
        kind = InputKind.PARAMETER
        if self._traced.is_constant(name):  # rows of what is no parameter are none
            kind, program.constants[own] = InputKind.CONSTANT_TENSOR, part
        else:
            program.state_dict[own] = nn.Parameter(part, requires_grad=False)
        specs = list(program.graph_signature.input_specs)
        at = next(i for i, spec in enumerate(specs) if spec.arg.name == parameter.name)
        specs.insert(at + 1, InputSpec(kind, TensorArgument(node.name), own))
        program._graph_signature = replace(program.graph_signature, input_specs=specs)
        self._parameters[node] = own
        self._made[key] = node
        self.sources[own] = name
        return node

"""How a part of a value is computed from parts of what it is made of.

slice(cat(y_0, y_1, …), t)                    y_t
slice(f(y), t), f elementwise                 f(slice(y, t))
slice(linear(x, W, b), t)                     linear(x, W[t], b[t]); along another axis linear(slice(x, t), W, b)
slice(einsum("bd,tde->bte", x, W), t)         einsum(x, W[t])
slice(softmax(y, k), t)                       softmax(slice(y, t), k)
slice(view(y, (B, T, K)), t)                  view(y[:, t·K:(t + 1)·K], (B, 1, K))
slice(squeeze / unsqueeze / stack …, t)       the same of the slice
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

from te_export.modules.trace import Traced

__all__ = ["Narrowing", "shape_of", "slice_of"]

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


def shape_of(node: Node) -> list[object]:
    """The sizes of a traced value; none where it is no tensor."""
    value = node.meta.get("val")
    return list(value.shape) if isinstance(value, Tensor) else []


def slice_of(node: Node) -> tuple[Node, int | None, int, int]:
    """What is sliced, along which axis, from where to where; without an axis where that is not plain."""
    given: list[Any] = [*node.args]
    given += [0, None, None, 1][len(given) - 1 :]
    source, axis, start, end, step = given
    size = shape_of(source)[axis]
    if step != 1 or not isinstance(size, int):
        return source, None, 0, 0
    first, last, _ = slice(start, end).indices(size)
    return source, axis % len(shape_of(source)), first, max(first, last)


class Narrowing:
    """Makes narrower nodes in a traced graph.

    Attributes:
        sources: by the name of a parameter that is some rows of another, that other.
    """

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
            _aten.einsum.default: self._einsum,
            _aten.bmm.default: self._bmm,
            _aten.matmul.default: self._matmul,
            _aten.permute.default: self._permute,
            _aten.transpose.int: self._transpose,
            _aten.softmax.int: self._softmax,
            _aten._softmax.default: self._softmax,
            _aten.view.default: self._view,
            _aten.reshape.default: self._view,
            _aten.sum.dim_IntList: self._sum,
            _aten.mean.dim: self._sum,
            **dict.fromkeys(_ELEMENTWISE, self._elementwise),
            **dict.fromkeys(_BROADCAST, self._broadcast),
        }

    def narrow(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        """A node that computes `node` from `start` to before `end` along `axis` of less than all of it; None where
        there is none.
        """
        if (start, end) == (0, shape_of(node)[axis]):
            return node
        if start == end:
            return None
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
        rank = len(shape_of(node))
        if over % rank != axis:
            return self._call(
                node.target, ([self._cut(part, axis, start, end) for part in parts], over), node
            )
        kept: list[Node] = []
        begin = 0
        for part in parts:
            size = shape_of(part)[axis]
            if not isinstance(size, int):
                return None
            low, high = max(start - begin, 0), min(end - begin, size)
            if low < high:
                kept.append(self._cut(part, axis, low, high))
            begin += size
        return kept[0] if len(kept) == 1 else self._call(node.target, (kept, over), node)

    def _stack(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        parts, over = self._joined(node)
        if over % len(shape_of(node)) != axis:
            return None
        return self._call(node.target, (parts[start:end], over), node)

    @staticmethod
    def _joined(node: Node) -> tuple[list[Node], int]:
        given: list[Any] = [*node.args]
        return list(given[0]), given[1] if len(given) > 1 else 0

    def _linear(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        x, weight, bias = (*node.args, None)[:3]
        if axis != len(shape_of(node)) - 1 and isinstance(
            x, Node
        ):  # of a tower that all tasks share, a task's rows
            inner = self.narrow(x, axis, start, end)
            return None if inner is None else self._call(node.target, (inner, *node.args[1:]), node)
        if axis != len(shape_of(node)) - 1 or not isinstance(weight, Node) or weight not in self._parameters:
            return None
        if len(shape_of(weight)) != 2:
            return None
        if isinstance(bias, Node) and (
            bias not in self._parameters or shape_of(bias) != shape_of(weight)[:1]
        ):
            return None
        rows: list[object] = [x, self._rows_of(weight, start, end)]
        if isinstance(bias, Node):
            rows.append(self._rows_of(bias, start, end))
        return self._call(node.target, tuple(rows), node)

    def _squeeze(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        source, gone = node.args
        if not isinstance(source, Node) or not isinstance(gone, int):
            return None
        if len(shape_of(node)) == len(shape_of(source)):  # the axis was longer than one, and stayed
            return self.narrow(source, axis, start, end)
        gone %= len(shape_of(source))
        inner = self.narrow(source, axis + (axis >= gone), start, end)
        return None if inner is None else self._call(node.target, (inner, gone), node)

    def _unsqueeze(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        source, added = node.args
        if not isinstance(source, Node) or not isinstance(added, int):
            return None
        added %= len(shape_of(node))
        if added == axis:
            return None
        inner = self.narrow(source, axis - (axis > added), start, end)
        return None if inner is None else self._call(node.target, (inner, added), node)

    def _slice(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        source, along, begin, _ = slice_of(node)
        if along == axis:
            return self._cut(source, axis, begin + start, begin + end)
        whole = str(shape_of(node)[0]) == str(shape_of(source)[0])
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
        rank, found = len(shape_of(node)), False
        for operand in node.args:
            place = axis - (rank - len(shape_of(operand))) if isinstance(operand, Node) else -1
            if not isinstance(operand, Node) or place < 0 or shape_of(operand)[place] == 1:
                made.append(operand)
                continue
            part, is_less = self._operand(operand, place, start, end)
            made.append(part)
            found = found or is_less
        return self._call(node.target, tuple(made), node) if found else None

    def _operand(self, node: Node, axis: int, start: int, end: int) -> tuple[Node, bool]:
        """Part of an operand, and whether less is computed or read for it than for all."""
        if node in self._parameters and axis == 0:
            return self._rows_of(node, start, end), True
        inner = self.narrow(node, axis, start, end)
        return inner or self._cut(node, axis, start, end), inner is not None

    def _einsum(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        given: list[Any] = [*node.args]
        equation, operands = given[0].replace(" ", ""), list(given[1])
        terms, _, out = equation.partition("->")
        if "." in equation or not out or any(len(set(term)) != len(term) for term in terms.split(",")):
            return None
        found = False
        for index, (term, operand) in enumerate(zip(terms.split(","), operands, strict=True)):
            place = term.find(out[axis])
            if place >= 0 and shape_of(operand)[place] == shape_of(node)[axis]:  # of size 1 it is broadcast
                operands[index], is_less = self._operand(operand, place, start, end)
                found = found or is_less
        return self._call(node.target, (equation, operands), node) if found else None

    def _bmm(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        operands: list[Any] = [*node.args]
        found = False
        for index in (0, 1):
            if axis in (0, index + 1):
                operands[index], is_less = self._operand(operands[index], axis, start, end)
                found = found or is_less
        return self._call(node.target, tuple(operands), node) if found else None

    def _matmul(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        """Of three axes each, and as many matrices, as bmm does."""
        shapes = [shape_of(operand) for operand in node.args if isinstance(operand, Node)]
        alike = len(shapes) == 2 and len({str(shape[0]) for shape in shapes if len(shape) == 3}) == 1
        return (
            self._bmm(node, axis, start, end) if alike and all(len(shape) == 3 for shape in shapes) else None
        )

    def _permute(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        given: list[Any] = [*node.args]
        source, axes = given[0], [place % len(shape_of(node)) for place in given[1]]
        inner = self.narrow(source, axes[axis], start, end)
        return None if inner is None else self._call(node.target, (inner, axes), node)

    def _transpose(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        given: list[Any] = [*node.args]
        source, (one, other) = given[0], (place % len(shape_of(node)) for place in given[1:])
        origin = {one: other, other: one}.get(axis, axis)
        inner = self.narrow(source, origin, start, end)
        return None if inner is None else self._call(node.target, (inner, one, other), node)

    def _sum(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        """Also of a mean: what is summed over is another axis than the one that is narrowed."""
        given: list[Any] = [*node.args]
        source, over = given[0], given[1]
        rank, keeps = len(shape_of(source)), len(given) > 2 and given[2]
        if node.kwargs or not over:
            return None
        gone = {place % rank for place in over}
        left = [place for place in range(rank) if keeps or place not in gone]
        if left[axis] in gone:
            return None
        inner = self.narrow(source, left[axis], start, end)
        return None if inner is None else self._call(node.target, (inner, *given[1:]), node)

    def _softmax(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        given: list[Any] = [*node.args]
        source, over = given[0], given[1] % len(shape_of(node))
        if over == axis or node.kwargs:
            return None
        inner = self.narrow(source, axis, start, end)
        return None if inner is None else self._call(node.target, (inner, *given[1:]), node)

    def _view(self, node: Node, axis: int, start: int, end: int) -> Node | None:
        """Of a view that takes the last axis apart, the first of its parts: what follows that axis stays together."""
        given: list[Any] = [*node.args]
        source, shape = given[0], shape_of(node)
        before, inner_sizes = shape_of(source), shape[axis + 1 :]
        sizes = [size for size in inner_sizes if isinstance(size, int)]
        if (
            len(sizes) < len(inner_sizes)
            or axis != len(before) - 1
            or list(map(str, before[:-1])) != list(map(str, shape[:axis]))
        ):
            return None
        each = math.prod(sizes)
        inner = self.narrow(source, axis, start * each, end * each)
        if inner is None:
            return None
        wanted = [end - start if place == axis else size for place, size in enumerate(given[1])]
        return self._call(node.target, (inner, wanted), node)

    def _rows_of(self, parameter: Node, start: int, end: int) -> Node:
        """Rows of a parameter, as a parameter of its own that shares its memory."""
        name = self._parameters[parameter]
        key = (name, start, end)
        if key in self._made:
            return self._made[key]
        own = f"{name}_rows_{start}_{end}"  # torch looks a dot up as an attribute of the tensor
        program = self._traced.program
        before = {key: node for key, node in self._made.items() if key[0] == name and key[1:] < (start, end)}
        after = before[max(before)] if before else parameter
        with self._graph.inserting_after(after):
            node = self._graph.placeholder(f"{parameter.name}_rows_{start}_{end}")
        node.meta["val"] = parameter.meta["val"][start:end]
        part = self._traced.tensor(name).detach()[start:end]
        kind = InputKind.PARAMETER
        if self._traced.is_constant(name):  # rows of what is no parameter are none
            kind, program.constants[own] = InputKind.CONSTANT_TENSOR, part
        else:
            program.state_dict[own] = nn.Parameter(part, requires_grad=False)
        specs = list(program.graph_signature.input_specs)
        at = next(i for i, spec in enumerate(specs) if spec.arg.name == after.name)
        specs.insert(at + 1, InputSpec(kind, TensorArgument(node.name), own))
        program._graph_signature = replace(program.graph_signature, input_specs=specs)
        self._parameters[node] = own
        self._made[key] = node
        self.sources[own] = name
        return node

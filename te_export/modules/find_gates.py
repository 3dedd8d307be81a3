"""Gates found by what they compute, whatever they are called: a softmax over experts that feeds a weighted sum.

    w = softmax(…)            one weight per row and expert, (B, K) but for axes of length 1
    f = Σ_k w_k · e_k         by multiply and sum, by matrix product, by einsum, or written out term by term

That f is this sum is not read off the operators: it is computed from the values of w and e, on rows that the module
answers, in float64. That e holds experts, and not the places of a sequence that attention looks at, is read off the
graph: its K slots are made apart from one another, or by a layer that has weights for each of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from te_export.modules.trace import Traced, batch_axis

__all__ = ["Gate", "find_gates", "last_gate"]

_aten = torch.ops.aten
_SOFTMAXES = frozenset({_aten.softmax.int, _aten._softmax.default, _aten._safe_softmax.default})
_VIEWS = frozenset(
    {
        _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.default, _aten.squeeze.dims, _aten.view.default,
        _aten.reshape.default, _aten.expand.default, _aten.permute.default, _aten.transpose.int, _aten.clone.default,
        _aten.dropout.default, _aten.alias.default, _aten.flatten.using_ints, _aten.t.default, _aten._to_copy.default,
        _aten.contiguous.default, _aten.repeat.default, _aten.expand_as.default, _aten.unflatten.int,
    }
)  # fmt: skip
_PRODUCTS = frozenset(
    {_aten.matmul.default, _aten.bmm.default, _aten.einsum.default, _aten.mm.default, _aten.baddbmm.default}
)
_SUMS = frozenset({_aten.sum.dim_IntList, _aten.sum.default})
_PIECES = frozenset({_aten.select.int, _aten.slice.Tensor, _aten.split.Tensor, _aten.unbind.int, _aten.chunk.default,
                     _aten.split_with_sizes.default})  # fmt: skip
_JOINS = frozenset({_aten.cat.default, _aten.stack.default})
_POINTWISE = frozenset(
    {_aten.relu.default, _aten.add.Tensor, _aten.mul.Tensor, _aten.gelu.default, _aten.tanh.default,
     _aten.sigmoid.default, _aten.leaky_relu.default, _aten.elu.default, _aten.silu.default, _aten.layer_norm.default}
)  # fmt: skip
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Gate:
    """A gate that one task's output depends on.

    Attributes:
        softmax: its node.
        fusion: the node whose value is the weighted sum.
        num_experts: K.
    """

    softmax: Node
    fusion: Node
    num_experts: int


def find_gates(traced: Traced, values: Mapping[Node, Any]) -> dict[Node, tuple[Gate, ...]]:
    """For every output, the gates on its way, nearest to the output first; those that others follow come later.

    Args:
        values: of every node, on some rows that the module answers, in float64.
    """
    gates = [gate for node in traced.graph.nodes if (gate := _as_gate(node, values)) is not None]
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    return {
        output: tuple(
            sorted(
                (gate for gate in gates if gate.fusion in above or gate.fusion is output),
                key=lambda gate: -order[gate.fusion],
            )
        )
        for output in traced.outputs()
        for above in [_ancestors(output)]
    }


def last_gate(gates: tuple[Gate, ...]) -> Gate | None:
    """The gate that no other on the way to the output follows; None where there are several, or none."""
    followed = {gate for gate in gates for other in gates if other is not gate and _reads(other, gate)}
    last = [gate for gate in gates if gate not in followed]
    return last[0] if len(last) == 1 else None


def _reads(later: Gate, earlier: Gate) -> bool:
    return earlier.fusion in _ancestors(later.fusion)


def _ancestors(node: Node) -> set[Node]:
    seen: set[Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += current.all_input_nodes
    return seen


def _as_gate(node: Node, values: Mapping[Node, Any]) -> Gate | None:
    if node.op != "call_function" or node.target not in _SOFTMAXES or batch_axis(node) != 0:
        return None
    weights = values.get(node)
    if not isinstance(weights, Tensor):
        return None
    count = weights[0].numel()
    axis = node.args[1]
    if count < 2 or not isinstance(axis, int) or weights.shape[axis] != count:
        return None
    flat = weights.reshape(len(weights), count)
    fusion = _whole_fusion(node, flat, values) or _fusion_by_terms(node, flat, values)
    return None if fusion is None else Gate(node, fusion, count)


def _whole_fusion(softmax: Node, weights: Tensor, values: Mapping[Node, Any]) -> Node | None:
    """The sum of a product of all weights at once."""
    for reader, operand in _through_views(softmax):
        if reader.target in _PRODUCTS:
            ends = [reader]
        elif reader.target is _aten.mul.Tensor:
            ends = [user for user in _view_readers(reader) if user.target in _SUMS]
        else:
            continue
        others = [other for other in _operands(reader) if other is not operand]
        for end, other in itertools.product(ends, others):
            if _is_weighted_sum(values.get(end), weights, values.get(other), other) and _holds_experts(
                other, weights.shape[1], values
            ):
                return end
    return None


def _operands(node: Node) -> list[Node]:
    return [*node.all_input_nodes]


def _through_views(node: Node) -> Iterator[tuple[Node, Node]]:
    """Nodes that read the value, looking through those that only lay it out otherwise; with what they read."""
    for user in node.users:
        if user.target in _VIEWS:
            yield from _through_views(user)
        else:
            yield user, node


def _view_readers(node: Node) -> Iterator[Node]:
    for user in node.users:
        if user.target in _VIEWS:
            yield from _view_readers(user)
        else:
            yield user


def _is_weighted_sum(found: object, weights: Tensor, experts: object, node: Node) -> bool:
    """Whether `found` is Σ_k weights[b, k] · experts[b, k], for some axis k of the experts."""
    if not isinstance(found, Tensor) or not isinstance(experts, Tensor):
        return False
    rows, count = weights.shape
    batch = batch_axis(node)
    if batch is None:
        return False
    for axis in range(experts.ndim):
        if axis == batch or experts.shape[axis] != count or found.numel() * count != experts.numel():
            continue
        slots = experts.movedim((batch, axis), (0, 1)).reshape(rows, count, -1)
        total = torch.einsum("bk,bkd->bd", weights, slots)
        rows_first = [found] if found.shape[0] == rows else []
        rows_first += [
            found.movedim(place, 0) for place in range(1, found.ndim) if found.shape[place] == rows
        ]
        if any(_close(candidate.reshape(rows, -1), total) for candidate in rows_first):
            return True
    return False


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or not bool(torch.isfinite(expected).all()):
        return False
    scale = float(expected.abs().max())
    return scale > 0 and float((found - expected).abs().max()) <= _TOLERANCE * scale


def _holds_experts(node: Node, count: int, values: Mapping[Node, Any]) -> bool:
    """Whether the K slots are made apart, or by a layer with weights for each."""
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        if current.target in _JOINS:
            parts = current.args[0]
            if (
                isinstance(parts, list | tuple)
                and _joined_slots(current, values) == count
                and len(set(parts)) > 1
            ):
                return True
            waiting += (
                [part for part in parts if isinstance(part, Node)] if isinstance(parts, list | tuple) else []
            )
        elif current.target in _PRODUCTS and any(
            batch_axis(operand) is None
            and isinstance(values.get(operand), Tensor)
            and count in values[operand].shape
            for operand in _operands(current)
        ):
            return True
        elif current.target in _VIEWS | _POINTWISE | _PIECES:
            waiting += current.all_input_nodes
        elif current.target is _aten.linear.default and isinstance(values.get(current), Tensor):
            weight = current.all_input_nodes[1]
            width = values[weight].shape[0] if isinstance(values.get(weight), Tensor) else 0
            if width % count == 0 and node is not current and _is_split_into(node, current, count):
                return True
    return False


def _joined_slots(join: Node, values: Mapping[Node, Any]) -> int:
    """The length of the joined axis."""
    axis = join.args[1] if len(join.args) > 1 else 0
    value = values.get(join)
    return value.shape[axis] if isinstance(value, Tensor) and isinstance(axis, int) else 0


def _is_split_into(node: Node, linear: Node, count: int) -> bool:
    """One wide layer whose outputs are laid out as (B, K, D): each expert has rows of its own."""
    value = node.meta.get("val")
    made = linear.meta.get("val")
    return (
        isinstance(value, Tensor)
        and isinstance(made, Tensor)
        and value.ndim == made.ndim + 1
        and count in [size for size in value.shape if isinstance(size, int)]
    )


def _fusion_by_terms(softmax: Node, weights: Tensor, values: Mapping[Node, Any]) -> Node | None:
    """w[:, 0]·e_0 + w[:, 1]·e_1 + … written out: the first sum that all terms have come to."""
    rows, count = weights.shape
    products: dict[int, Node] = {}
    for piece in _pieces(softmax):
        value = values.get(piece)
        if not isinstance(value, Tensor) or value.numel() != rows:
            continue
        index = next((k for k in range(count) if torch.equal(value.reshape(rows), weights[:, k])), None)
        readers = [reader for reader, _ in _through_views(piece) if reader.target is _aten.mul.Tensor]
        if index is not None and len(readers) == 1:
            products[index] = readers[0]
    if len(products) != count or len(set(products.values())) != count:
        return None
    terms = [values[product] for product in products.values()]
    if len({tuple(term.shape) for term in terms}) != 1:
        return None
    total = torch.stack(terms).sum(0)
    for candidate in _after(set(products.values())):
        found = values.get(candidate)
        if isinstance(found, Tensor) and found.shape == total.shape and _close(found, total):
            return candidate
    return None


def _pieces(node: Node) -> Iterator[Node]:
    """Nodes that take some of the weights, and what is taken of those."""
    for user in node.users:
        if (
            user.target in _PIECES
            or user.target in _VIEWS
            or getattr(user.target, "__name__", "") == "getitem"
        ):
            yield user
            yield from _pieces(user)


def _after(nodes: set[Node]) -> Iterator[Node]:
    """Nodes that only add up what stands before them, in order."""
    reached = set(nodes)
    for node in next(iter(nodes)).graph.nodes:
        if node in nodes or node.op != "call_function":
            continue
        adds = node.target in (_aten.add.Tensor, *_SUMS, *_JOINS, *_VIEWS)
        if adds and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            yield node

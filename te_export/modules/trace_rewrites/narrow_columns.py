"""A task that is one column of a fused output depends on what makes that column, and on no more.

Pieces of columns (slices, single columns, parts of a split) are pulled back through the operators that made them
(narrowing.py says how), until nothing above can be narrowed: there a slice stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from te_export.modules.trace import Traced, batch_axis
from te_export.modules.trace_rewrites.narrowing import Narrowing, shape_of, slice_of

__all__ = ["Narrowed", "Piece", "narrow_columns", "piece_of"]

_aten = torch.ops.aten
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
    """Narrow every piece of columns whose task can do without the others, in place, and the program's state with it.

    What serves which task is known anew once pieces were narrowed: towers that one output held read less then.
    """
    work = Narrowing(traced)
    slices = 0
    while done := _narrow_once(traced, work):
        slices += done
        traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.program.graph_module.recompile()
    return Narrowed(slices, work.sources)


def _narrow_once(traced: Traced, work: Narrowing) -> int:
    """How many pieces were narrowed, of those that can be with what each node serves now."""
    served, outputs = _served(traced), set(traced.outputs())
    done = 0
    for node in reversed(list(traced.graph.nodes)):
        piece = piece_of(node) if served.get(node) else None
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
    return done


@dataclass(frozen=True)
class Piece:
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


def piece_of(node: Node) -> Piece | None:
    """What a node takes a piece of; None where it takes none, or not plainly."""
    given: list[Any] = [*node.args]
    if node.target is _aten.slice.Tensor:
        source, axis, start, end = slice_of(node)
        return None if axis is None else Piece(source, source, axis, start, end)
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
    axis %= len(shape_of(source))
    sizes = [part.shape[axis] for part in whole.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    start = sum(sizes[:index])
    return Piece(source, whole, axis, start, start + sizes[index])


def _entry(source: Node, cut: Node, axis: int, index: int) -> Piece | None:
    axis %= len(shape_of(source))
    size = shape_of(source)[axis]
    if not isinstance(size, int):
        return None
    return Piece(source, cut, axis, index % size, index % size + 1, drops_axis=True)

"""The weights of a variant's graphs, and letting one more graph read those instead of copies of its own.

Initializers of one name are one tensor in weights.bin, so a graph that is added must mean the same by a name as the
others do: what it has alike is shared, what it has under a name that is taken is renamed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from te_export.rewrite.edit import Edit
from te_export.rewrite.linear import read_linear
from te_export.rewrite.stack import Part, stack_of, stack_tensors
from te_export.rewrite.turned import turn, turned_name

__all__ = ["SharedWeights", "share_weights", "shared_weights"]


@dataclass(frozen=True)
class SharedWeights:
    """What the graphs of a variant read.

    Attributes:
        tensors: initializers and the parts of stacks, by name, without the stacks themselves.
        laid_out: a number for each part of a stack; neighbours in a stack have consecutive numbers, parts of
            different stacks have not.
    """

    tensors: Mapping[str, ir.TensorProtocol]
    laid_out: Mapping[str, int]


def shared_weights(graphs: Sequence[ir.Graph]) -> SharedWeights:
    """What `graphs` read, in the order in which weights.bin lays it out."""
    tensors: dict[str, ir.TensorProtocol] = {}
    laid_out: dict[str, int] = {}
    number = 0
    for graph in graphs:
        for name, value in graph.initializers.items():
            stack = stack_of(value.const_value)
            for part in _parts(name, value.const_value):
                tensors.setdefault(part.name, part.tensor)
                if stack is not None:
                    laid_out.setdefault(part.name, number)
                    number += 1
            number += 1
    return SharedWeights(tensors, laid_out)


def _parts(name: str, tensor: ir.TensorProtocol | None) -> Sequence[Part]:
    """The parts of a stack, or the one tensor that there is."""
    assert tensor is not None  # initializers have values
    stack = stack_of(tensor)
    return (Part(name, tensor),) if stack is None else stack.parts


def share_weights(model: ir.Model, shared: SharedWeights, *, suffix: str) -> dict[str, str]:
    """Let `model` read what is shared, in place.

    A weight that the others have turned is turned here too. A stack gets a name of its own, since its name does
    not tell its parts; weights.bin finds it where they lie.

    Args:
        suffix: what makes a name one that no other graph has.

    Returns:
        For each initializer that is new or renamed, the name of the one it was.
    """
    made = _turn_alike(model.graph, shared)
    for name, value in list(model.graph.initializers.items()):
        (part, *rest) = _parts(name, value.const_value)
        stack = stack_of(value.const_value)
        if stack is not None:
            parts = [_shared_part(one, shared, suffix) for one in (part, *rest)]
            value.const_value = stack_tensors(name, parts, stack.axes)
            made[_rename(value, suffix)] = name
            continue
        found = _shared_part(part, shared, suffix)
        value.const_value = found.tensor
        if found.name != name:
            made[_rename(value, suffix)] = name
    return made


def _turn_alike(graph: ir.Graph, shared: SharedWeights) -> dict[str, str]:
    edit = Edit(graph)
    made: dict[str, str] = {}
    for layer in [read_linear(node) for node in graph]:
        name = "" if isinstance(layer, str) else str(layer.weight.name)
        if isinstance(layer, str) or layer.turned or name in shared.tensors:
            continue
        if turned_name(name) in shared.tensors:
            new, old = turn(edit, layer)
            made[new] = old
    if made:
        edit.done()
    return made


def _shared_part(part: Part, shared: SharedWeights, suffix: str) -> Part:
    """The tensor that has the name elsewhere; under another name where that is another one."""
    known = shared.tensors.get(part.name)
    if known is None:
        return part
    return Part(part.name, known) if _alike(part.tensor, known) else Part(f"{part.name}{suffix}", part.tensor)


def _rename(value: ir.Value, suffix: str) -> str:
    value.name = f"{value.name}{suffix}"
    return value.name


def _alike(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    if one is other:
        return True
    return (
        one.dtype == other.dtype
        and tuple(one.shape.numpy()) == tuple(other.shape.numpy())
        and bool(np.array_equal(one.numpy(), other.numpy(), equal_nan=one.dtype.is_floating_point()))
    )

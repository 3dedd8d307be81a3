"""Regions of values, and what a rule that maps them is."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

__all__ = ["Needs", "Region", "Rule", "Sizes", "Span", "integer_of", "sizes_of"]

Span = tuple[int, int] | None
"""From one index to before another; None is the whole axis. The batch axis is always taken whole."""
Region = tuple[Span, ...] | None
"""A span for each axis; None is everything."""

Sizes = list[int | None]
Needs = Iterable[tuple[ir.Value | None, Region]]

Rule = Callable[[ir.Node, ir.Value, tuple[Span, ...]], Needs | None]
"""From a node, one of its outputs and a region of that to the regions of its inputs that it is made of; an input
that is not named is not used at all. None where the rule cannot tell. All inputs have known ranks."""


def sizes_of(value: ir.Value | None) -> Sizes | None:
    """The shape, with None for a symbolic axis; None where it is not known."""
    if value is None:
        return None
    if value.shape is not None:
        return [axis if isinstance(axis, int) else None for axis in value.shape]
    if value.const_value is not None:
        return [axis if isinstance(axis, int) else None for axis in value.const_value.shape]
    return None


def integer_of(node: ir.Node, name: str, default: int) -> int:
    """An attribute of the node, or what it is where it is left out."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()

"""Sums that a loop began with zeros: zeros + w_0·e_0 + w_1·e_1 + … is the sum without them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from te_export.modules.trace import Traced

__all__ = ["drop_zeros", "is_zero"]

_aten = torch.ops.aten
_ZEROS = frozenset({_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default})
_FULL: dict[object, int] = {_aten.full.default: 1, _aten.full_like.default: 1, _aten.new_full.default: 2}
"""What fills with a number, and which argument that is."""


def drop_zeros(traced: Traced) -> None:
    """Take zeros out of the sums that they change neither in shape nor in dtype, in place."""
    for node in traced.graph.nodes:
        if node.target is not _aten.add.Tensor or node.kwargs:
            continue
        for zeros, other in (node.args, node.args[::-1]):
            if isinstance(other, Node) and is_zero(zeros) and _form(other) == _form(node):
                node.replace_all_uses_with(other)
                break
    traced.graph.eliminate_dead_code()
    traced.program.graph_module.recompile()


def is_zero(node: object) -> bool:
    """Whether an argument is the number 0, or is filled with it."""
    if not isinstance(node, Node):
        return node == 0
    place = _FULL.get(node.target)
    return node.target in _ZEROS or (place is not None and node.args[place] in (0, False))


def _form(node: Node) -> tuple[object, ...]:
    value = node.meta.get("val")
    return (value.dtype, *map(str, value.shape)) if isinstance(value, Tensor) else ()

"""Integers divided by integers stay integers: torch's exporter would divide them as float32, which is wrong from 2^24 on.

div(a, b, rounding_mode="floor")      a // b
div(a, b, rounding_mode="trunc")      (a - fmod(a, b)) // b
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from te_export.modules.trace import Traced
from te_export.modules.trace_rewrites.new_nodes import call

__all__ = ["divide_exactly"]

_aten = torch.ops.aten
_ROUNDING = frozenset({_aten.div.Tensor_mode, _aten.div.Scalar_mode})


def divide_exactly(traced: Traced) -> None:
    """Take the division of integers for that, in place."""
    for node in list(traced.graph.nodes):
        if node.target not in _ROUNDING or node.meta["val"].is_floating_point():
            continue
        given: list[Any] = [*node.args]
        mode = node.kwargs.get("rounding_mode")
        dividend, divisor = given
        if mode not in ("floor", "trunc") or not isinstance(dividend, Node) or not _is_of(divisor, dividend):
            continue
        with traced.graph.inserting_before(node):
            if mode == "trunc":
                rest = call(
                    traced.graph,
                    _aten.fmod.Tensor if isinstance(divisor, Node) else _aten.fmod.Scalar,
                    dividend,
                    divisor,
                )
                dividend = call(traced.graph, _aten.sub.Tensor, dividend, rest)
            node.replace_all_uses_with(call(traced.graph, _aten.floor_divide.default, dividend, divisor))
    traced.graph.eliminate_dead_code()
    traced.program.graph_module.recompile()


def _is_of(divisor: object, dividend: Node) -> bool:
    """Whether both are integers of one width."""
    if not isinstance(divisor, Node):
        return isinstance(divisor, int)
    one, other = divisor.meta["val"], dividend.meta["val"]
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype

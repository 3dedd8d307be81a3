"""Whether what is weighed are experts, and not the places of a sequence or the features of one layer.

stack(f_0(x), f_1(x), …)                    experts: each is made by layers of its own
einsum("bd,kde->bke", x, w), x @ w          experts: a matrix for each of them in one tensor (K, D, E)
linear(x).view(B, K, E), .chunk(K)          experts of one wide layer, where E > 1
linear(x) of (B, L, D), stack(f(x_0), …)    a sequence: the same layer makes every place
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from te_export.modules.operators import JOINS, PIECES, PRODUCTS, VIEWS, is_getitem
from te_export.modules.trace import ancestors, batch_axis

__all__ = ["ExpertSearch"]

_aten = torch.ops.aten
_LINEARS = frozenset({_aten.linear.default, _aten.addmm.default, _aten.mm.default, _aten.matmul.default})
_POINTWISE = frozenset(
    {_aten.relu.default, _aten.add.Tensor, _aten.mul.Tensor, _aten.gelu.default, _aten.tanh.default,
     _aten.sigmoid.default, _aten.leaky_relu.default, _aten.elu.default, _aten.silu.default, _aten.layer_norm.default}
)  # fmt: skip


@dataclass(frozen=True)
class ExpertSearch:
    """Looks for what makes K slots of a value apart from one another.

    Attributes:
        count: K.
        values: of every node.
        parameters: the placeholders of weights.
        in_wide_layers: whether the columns of one wide layer may be experts. Those that a product with gated features
            sums are as often a layer whose weights another one makes.
    """

    count: int
    values: Mapping[Node, Any]
    parameters: frozenset[Node]
    in_wide_layers: bool = True

    def is_of_experts(self, node: Node) -> bool:
        """Whether one axis of a value counts experts."""
        return self._find([node], features=self._row_size(node) // self.count)

    def are_experts(self, parts: Sequence[Node]) -> bool:
        """Whether values that no axis brings together are an expert each."""
        return self._are_apart(parts) or self._find(parts, features=self._row_size(parts[0]))

    def _find(self, nodes: Sequence[Node], *, features: int) -> bool:
        """Whether something above the nodes tells experts of so many features apart."""
        waiting, seen = [*nodes], set()
        while waiting:
            current = waiting.pop()
            if current in seen or current.op != "call_function":
                continue
            seen.add(current)
            if self._joins_experts(current) or self._has_weights_of_each(current):
                return True
            if self.in_wide_layers and self._is_as_wide(current, features):
                return True
            if current.target in JOINS | VIEWS | PIECES | _POINTWISE or is_getitem(current):
                waiting += current.all_input_nodes
        return False

    def _joins_experts(self, node: Node) -> bool:
        if node.target not in JOINS:
            return False
        axis = node.args[1] if len(node.args) > 1 else 0
        value = self.values.get(node)
        joins_all = isinstance(value, Tensor) and isinstance(axis, int) and value.shape[axis] == self.count
        return joins_all and self._are_apart(node.all_input_nodes)

    def _are_apart(self, parts: Sequence[Node]) -> bool:
        """Whether layers that not all parts share make one of them otherwise than another."""
        above = [ancestors(part) | {part} for part in parts]
        shared = set[Node].intersection(*above)
        layers = {
            frozenset(read for node in own - shared for read in node.all_input_nodes) & self.parameters
            for own in above
        }
        return len(layers) > 1

    def _has_weights_of_each(self, node: Node) -> bool:
        """(B, D) times (K, D, E): a matrix for each expert."""
        return node.target in PRODUCTS and any(
            batch_axis(operand) is None
            and isinstance(value := self.values.get(operand), Tensor)
            and value.ndim > 2
            and self.count in value.shape
            for operand in node.all_input_nodes
        )

    def _is_as_wide(self, node: Node, features: int) -> bool:
        """(B, D) times (D, K·E), where each expert has E > 1 columns of its own."""
        value = self.values.get(node)
        return (
            node.target in _LINEARS
            and isinstance(value, Tensor)
            and value.ndim == 2
            and features > 1
            and value.shape[1] % (self.count * features) == 0
        )

    def _row_size(self, node: Node) -> int:
        value, axis = self.values.get(node), batch_axis(node)
        return value.numel() // value.shape[axis] if isinstance(value, Tensor) and axis is not None else 0

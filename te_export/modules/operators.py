"""torch's operators by what they do to values, as a traced program has them."""

from __future__ import annotations

import torch
from torch.fx import Node

__all__ = ["JOINS", "LAYERS", "PIECES", "PRODUCTS", "VIEWS", "is_getitem"]

_aten = torch.ops.aten
VIEWS = frozenset(
    {
        _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.default, _aten.squeeze.dims, _aten.view.default,
        _aten.reshape.default, _aten.expand.default, _aten.permute.default, _aten.transpose.int, _aten.clone.default,
        _aten.dropout.default, _aten.alias.default, _aten.flatten.using_ints, _aten.t.default, _aten._to_copy.default,
        _aten.contiguous.default, _aten.repeat.default, _aten.expand_as.default, _aten.unflatten.int,
    }
)  # fmt: skip
PRODUCTS = frozenset(
    {_aten.matmul.default, _aten.bmm.default, _aten.einsum.default, _aten.mm.default, _aten.baddbmm.default}
)
PIECES = frozenset({_aten.select.int, _aten.slice.Tensor, _aten.split.Tensor, _aten.unbind.int, _aten.chunk.default,
                    _aten.split_with_sizes.default})  # fmt: skip
JOINS = frozenset({_aten.cat.default, _aten.stack.default})
LAYERS = PRODUCTS | {
    _aten.linear.default, _aten.addmm.default, _aten.convolution.default, _aten.conv1d.default, _aten.conv2d.default,
    _aten.conv3d.default, _aten.embedding.default, _aten.layer_norm.default, _aten.native_layer_norm.default,
    _aten.batch_norm.default, _aten.group_norm.default, _aten.lstm.input, _aten.gru.input,
    _aten.scaled_dot_product_attention.default,
}  # fmt: skip


def is_getitem(node: Node) -> bool:
    """Whether it takes one of several results."""
    return getattr(node.target, "__name__", "") == "getitem"

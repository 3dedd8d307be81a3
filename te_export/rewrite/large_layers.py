"""Which linear layers are large enough to be held in a lower precision.

It is asked of each part of a stack, and a stack has large parts or small ones, never both: a layer that one graph has
stacked and another alone is then large in both or in neither.
"""

from __future__ import annotations

from te_export.rewrite.linear import Linear, tensor_of
from te_export.rewrite.stack import stack_of

__all__ = ["SMALLEST_WEIGHT", "is_large"]

SMALLEST_WEIGHT = 16_384
"""Elements. Converting a smaller layer was measured to cost more time than it saves."""


def is_large(layer: Linear) -> bool:
    """Whether every weight of the layer, of a stack every part, has at least SMALLEST_WEIGHT elements."""
    stack = stack_of(tensor_of(layer.weight))
    if stack is None:
        return layer.width_in * layer.width_out >= SMALLEST_WEIGHT
    return min(part.tensor.size for part in stack.parts) >= SMALLEST_WEIGHT

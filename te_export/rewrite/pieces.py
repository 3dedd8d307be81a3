"""The pieces of a Split: how the rules hand a stack of values (B, T·D) to one another.

    s (B, T·D) → Split(axis=1) → p_0 (B, D), …, p_{T-1} (B, D)

A rule that treats all pieces alike works on s instead, and ends in a Split of its own, so that rules
compose: what is between one Split and the next is looked through, not undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from te_export.rewrite.edit import Axes, Edit, axes_of

__all__ = ["Pieces", "as_cube", "pieces_of", "read_split"]


@dataclass(frozen=True)
class Pieces:
    """Equal pieces of one value, in order and complete.

    Attributes:
        whole: (B, count · width).
    """

    whole: ir.Value
    values: tuple[ir.Value, ...]
    batch: int | str
    width: int

    @property
    def count(self) -> int:
        return len(self.values)


def read_split(node: ir.Node | None) -> Pieces | None:
    """The pieces that a Split makes of (B, T·D) along its last axis; None for anything else."""
    if node is None or node.op_type != "Split" or node.inputs[0] is None:
        return None
    whole = node.inputs[0]
    axis = node.attributes.get("axis")
    axes = [found for value in (whole, *node.outputs) if (found := axes_of(value)) and len(found) == 2]
    if axis is None or axis.as_int() not in (1, -1) or len(axes) != 1 + len(node.outputs):
        return None
    batch, total = axes[0]
    width = axes[1][1]
    if not isinstance(width, int) or total != width * len(node.outputs):
        return None
    if any(found[1] != width for found in axes[1:]):
        return None
    return Pieces(whole, tuple(node.outputs), batch, width)


def pieces_of(values: Sequence[ir.Value]) -> Pieces | None:
    """The Split whose pieces `values` are, all of them and in order."""
    pieces = read_split(values[0].producer())
    return pieces if pieces is not None and list(pieces.values) == list(values) else None


def as_cube(edit: Edit, pieces: Pieces, perm: Sequence[int], *, name: str) -> ir.Value:
    """The whole of `pieces` as (B, T, D), its axes in the order `perm`.

    Where the whole was made out of such a value, that value itself.
    """
    cube: Axes = (pieces.batch, pieces.count, pieces.width)
    wanted = tuple(cube[axis] for axis in perm)
    origin = _origin(pieces.whole, cube)
    if origin is None:
        shape = edit.integers([-1, pieces.count, pieces.width], name=f"{name}.shape")
        origin = edit.add("Reshape", [pieces.whole, shape], cube, name=f"{name}.cube")
    if list(perm) == [0, 1, 2]:
        return origin
    back = origin.producer()
    if back is not None and back.op_type == "Transpose" and back.inputs[0] is not None:
        order = back.attributes["perm"].as_ints()
        undone = [order[axis] for axis in perm]
        if undone == [0, 1, 2]:
            return back.inputs[0]
        return edit.add("Transpose", [back.inputs[0]], wanted, name=f"{name}.turn", perm=undone)
    return edit.add("Transpose", [origin], wanted, name=f"{name}.turn", perm=list(perm))


def _origin(whole: ir.Value, cube: Axes) -> ir.Value | None:
    """The value (B, T, D) that `whole` is a Reshape of."""
    node = whole.producer()
    if node is not None and node.op_type == "Reshape" and axes_of(node.inputs[0]) == cube:
        return node.inputs[0]
    return None

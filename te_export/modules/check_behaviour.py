"""What a module must not do: draw random numbers, change itself, answer otherwise the second time, or let the rows of a
batch see each other."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from te_export.errors import CaptureError
from te_export.models.input_rows import InputRows
from te_export.modules.all_tasks import AllTasks
from te_export.modules.blame import line_of_attribute, line_of_error, line_of_node
from te_export.modules.trace import Traced, batch_axis
from te_export.modules.traced_module import record_values

__all__ = ["MIDDLE", "check_nothing_is_drawn", "check_rows_apart", "check_stays_as_it_is"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_TOLERANCE = 1e-9
MIDDLE = 3
"""Which row of each half is the same: rows before and after it are others, for what looks one way alone."""


def check_nothing_is_drawn(traced: Traced, rows: InputRows) -> None:
    """Run the program twice. Attention and recurrent layers may draw random numbers too, and do not in eval mode.

    Raises:
        CaptureError: an operator that may draw random numbers gives others the second time, naming the line.
    """
    nodes = [
        node
        for node in traced.graph.nodes
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    ]
    if not nodes:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one = record_values(traced, rows)
        torch.manual_seed(1)
        other = record_values(traced, rows)
    for node in nodes:
        pairs = zip(pytree.tree_leaves(one[node]), pytree.tree_leaves(other[node]), strict=True)
        if not all(_same(found, expected) for found, expected in pairs if isinstance(found, Tensor)):
            where = line_of_node(node)
            raise CaptureError(
                f"forward draws random numbers in eval mode ({node.target}){f' ({where})' if where else ''}: no export can "
                "give the same. Draw them in training mode alone: F.dropout(x, p, training=self.training)"
            )


def check_stays_as_it_is(module: AllTasks, rows: InputRows) -> None:
    """Ask the module twice, and for one row alone.

    Raises:
        CaptureError: a parameter, buffer or plain attribute changed, the second answer is another, or one row is
            answered in another shape.
    """
    before, versions = _attributes(module.module), _versions(module.module)
    with torch.no_grad():
        first = [answer.clone() for answer in module(*rows.tensors())]
        _refuse_changes(module.module, before, versions)
        second = module(*rows.tensors())
    _refuse_another_shape(module, rows, first)
    for one, other in zip(first, second, strict=True):
        if not torch.equal(one.nan_to_num(), other.nan_to_num()):
            raise CaptureError(
                f"{type(module.module).__name__} answers the same rows otherwise the second time: it draws random numbers, "
                "or keeps something from call to call. In eval mode its answer must follow from its input alone"
            )


def _refuse_another_shape(module: AllTasks, rows: InputRows, several: Sequence[Tensor]) -> None:
    name = type(module.module).__name__
    mend = "Write squeeze(1) or flatten(1) for squeeze(), and take out of forward what looks at the number of rows"
    try:
        with torch.no_grad():
            alone = module(*rows[[0]].tensors())
    except Exception as error:  # the module's own code may raise anything
        where = line_of_error(error)
        raise CaptureError(
            f"{name} fails on one row alone with {type(error).__name__}: {error!s:.300}{f' ({where})' if where else ''}, "
            f"and a bundle answers any number of rows. {mend}"
        ) from error
    shapes = [(tuple(one.shape[1:]), tuple(more.shape[1:])) for one, more in zip(alone, several, strict=True)]
    if any(one != more for one, more in shapes) or any(len(one) != 1 for one in alone):
        found = ", ".join(str(tuple(one.shape)) for one in alone)
        expected = ", ".join(str((1, *more)) for _, more in shapes)
        raise CaptureError(f"{name} answers one row with shapes {found}, expected {expected}. {mend}")


def check_rows_apart(traced: Traced, rows: InputRows) -> None:
    """Compare what every operator gives for one row among different others.

    Args:
        rows: an even number, of which both halves have the same row at MIDDLE.

    Raises:
        CaptureError: a row's value depends on the other rows, naming the line.
    """
    half = len(rows) // 2
    one, other = record_values(traced, rows[:half]), record_values(traced, rows[half:])
    for node in traced.graph.nodes:
        if node.op != "call_function":
            continue
        if _same_for_the_row(node, one, other, half):
            continue
        where = line_of_node(node)
        raise CaptureError(
            f"an answer depends on the other rows of its batch: {node.target}{f' ({where})' if where else ''} gives a row "
            "another value when the rest of the batch is another. Compute means, norms and maxima over the axes of a row "
            "(dim=1 and on), or put what was taken over the batch into a buffer while training"
        )


def _same_for_the_row(node: Node, one: Mapping[Node, Any], other: Mapping[Node, Any], rows: int) -> bool:
    """Whether what a node gives for the row at MIDDLE is the same in both; of a value without a batch axis, all of it.

    Where several entries of an axis belong to a row, they may lie together or a whole batch apart.
    """
    values = (one.get(node), other.get(node))
    found, expected = values
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor) or not found.numel():
        return True
    axis = batch_axis(node)
    if axis is None:
        return _same(found, expected)
    each, odd = divmod(found.shape[axis], rows)
    if odd or not each:
        return True
    together = (value.narrow(axis, MIDDLE * each, each) for value in (found, expected))
    apart = (
        value.index_select(axis, torch.arange(MIDDLE, value.shape[axis], rows)) for value in (found, expected)
    )
    return _same(*together) or _same(*apart)


def _same(found: Tensor, expected: Tensor) -> bool:
    if not found.is_floating_point():
        return torch.equal(found, expected)
    if not found.numel():
        return True
    one, other = found.nan_to_num(), expected.nan_to_num()
    return float((one - other).abs().max()) <= _TOLERANCE * max(float(one.abs().max()), 1e-300)


def _attributes(module: nn.Module) -> dict[tuple[str, str], object]:
    """Plain attributes of every part of the module: numbers, text, and lists or dicts of them."""
    return {
        (path, name): copy.deepcopy(value)
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }


def _is_plain(value: object, depth: int = 0) -> bool:
    if isinstance(value, _PLAIN):
        return True
    if depth > 3 or not isinstance(value, list | tuple | set | dict):
        return False
    parts = list(value.values()) if isinstance(value, dict) else list(value)
    return all(_is_plain(part, depth + 1) for part in parts)


def _versions(module: nn.Module) -> dict[str, tuple[int, int]]:
    """What tells that a tensor was written to, or replaced."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: (tensor._version, tensor.data_ptr()) for name, tensor in tensors}


def _refuse_changes(
    module: nn.Module, before: Mapping[tuple[str, str], object], versions: Mapping[str, tuple[int, int]]
) -> None:
    changed = [name for name, version in _versions(module).items() if versions.get(name) != version]
    parts = dict(module.named_modules())
    after = _attributes(module)
    attributes = [key for key in before if key not in after or after[key] != before[key]]
    if changed:
        path, _, name = changed[0].rpartition(".")
        what, where = changed[0], line_of_attribute(parts[path], name)
    elif attributes:
        path, name = attributes[0]
        what, where = f"{path}.{name}".lstrip("."), line_of_attribute(parts[path], name)
    else:
        return
    raise CaptureError(
        f"the module changes itself: {what} is written to in forward{f' ({where})' if where else ''}. Have forward do so in "
        "training mode alone (if self.training), or return the new value"
    )

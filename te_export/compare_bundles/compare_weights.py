"""Pairing the weights of two bundles and measuring each pair.

Shared weights are paired by name. Those of a task that is in both are paired by name, or by the name without the
task's own name in it, or by the name without its first number: `task_heads.2.0.weight` of a task is
`task_heads.1.0.weight` once the task before it is gone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from te_export.compare_bundles.bundle_weights import Weight
from te_export.compare_bundles.result import TaskPair, ValueChange, WeightChange, WeightStatus
from te_export.compare_bundles.value_change import measure_change

__all__ = ["compare_weights"]

_FIRST_NUMBER = re.compile(r"\d+")
_Pairs = list[tuple[Weight, Weight]]


def compare_weights(
    before: Sequence[Weight], after: Sequence[Weight], tasks: Iterable[TaskPair]
) -> tuple[WeightChange, ...]:
    """Every weight of either bundle, A's in order, then those of B alone.

    Args:
        before, after: of the two bundles.
        tasks: which task is which.

    Raises:
        BundleError: weights cannot be read.
    """
    pairs = _pair(before, after, tuple(tasks))
    partner = {id(old): new for old, new in pairs}
    paired = {id(new) for _, new in pairs}
    found = [_change(old, partner.get(id(old))) for old in before]
    return (*found, *(_change(None, new) for new in after if id(new) not in paired))


def _pair(before: Sequence[Weight], after: Sequence[Weight], tasks: tuple[TaskPair, ...]) -> _Pairs:
    own_before, own_after = _by_task(before), _by_task(after)
    pairs = _by_name(own_before.pop(None, []), own_after.pop(None, []))
    for task in tasks:
        if task.in_both:
            old, new = own_before.get(task.before, []), own_after.get(task.after, [])
            pairs += _pair_own(old, new)
    old, new = _left(before, after, pairs)
    alone = (
        {task.before for task in tasks if task.after is None},
        {task.after for task in tasks if task.before is None},
    )
    # A weight may move between what tasks share and what one has; but one of a task that is gone is no other task's.
    return pairs + [
        (one, other)
        for one, other in _by_name(old, new)
        if not (one.task in alone[0] and other.task in alone[1]) and (one.task is None or other.task is None)
    ]


def _by_task(weights: Sequence[Weight]) -> dict[str | None, list[Weight]]:
    found: dict[str | None, list[Weight]] = {}
    for weight in weights:
        found.setdefault(weight.task, []).append(weight)
    return found


def _by_name(before: Sequence[Weight], after: Sequence[Weight]) -> _Pairs:
    names = {weight.name: weight for weight in after}
    return [(weight, names[weight.name]) for weight in before if weight.name in names]


def _pair_own(before: Sequence[Weight], after: Sequence[Weight]) -> _Pairs:
    """Pairs among the weights of one task."""
    pairs = _by_name(before, after)
    for template in (_without_task, _without_number):
        pairs += _by_template(*_left(before, after, pairs), template)
    return pairs


def _by_template(
    before: Sequence[Weight], after: Sequence[Weight], template: Callable[[Weight], str]
) -> _Pairs:
    """Pairs of one template, where no other weight of the task could be meant."""
    times = Counter(map(template, before)) | Counter(map(template, after))
    known = {template(weight): weight for weight in after}
    return [
        (weight, known[template(weight)])
        for weight in before
        if template(weight) in known and times[template(weight)] == 1
    ]


def _without_task(weight: Weight) -> str:
    return ".".join("#" if part == weight.task else part for part in weight.name.split("."))


def _without_number(weight: Weight) -> str:
    return _FIRST_NUMBER.sub("#", weight.name, count=1)


def _left(
    before: Sequence[Weight], after: Sequence[Weight], pairs: _Pairs
) -> tuple[list[Weight], list[Weight]]:
    paired = {id(weight) for pair in pairs for weight in pair}
    return [w for w in before if id(w) not in paired], [w for w in after if id(w) not in paired]


def _change(before: Weight | None, after: Weight | None) -> WeightChange:
    status, values = _status(before, after)
    return WeightChange(
        status=status,
        name_before=None if before is None else before.name,
        name_after=None if after is None else after.name,
        part_before=None if before is None else before.part,
        part_after=None if after is None else after.part,
        shape_before=None if before is None else before.tensor.layer_shape,
        shape_after=None if after is None else after.tensor.layer_shape,
        values=values,
    )


def _status(before: Weight | None, after: Weight | None) -> tuple[WeightStatus, ValueChange | None]:
    if before is None:
        return "added", None
    if after is None:
        return "removed", None
    old, new = before.tensor, after.tensor
    if (old.logical_shape, old.kind) != (new.logical_shape, new.kind):
        return "reshaped", None
    values = measure_change(old, new)
    return ("same" if values is None else "changed"), values

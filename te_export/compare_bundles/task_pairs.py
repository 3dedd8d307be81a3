"""Which task of one bundle is which of the other, and what changed of it.

In this order: the same name and the same weights; the same weights under another name, where no third task has
them; the same name. What is left was added or removed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from te_export.compare_bundles.bundle_weights import Weight
from te_export.compare_bundles.result import Fact, TaskChange, TaskPair, TasksDiff
from te_runtime.manifest import Manifest, TaskSpec, TensorSpec

__all__ = ["compare_tasks"]

_Signature = Hashable


def compare_tasks(
    before: Manifest, after: Manifest, weights_before: Sequence[Weight], weights_after: Sequence[Weight]
) -> TasksDiff:
    """Pair the tasks of two bundles.

    Raises:
        BundleError: weights cannot be read.
    """
    pairs = _pair(_signatures(before, weights_before), _signatures(after, weights_after))
    specs_before = {task.name: task for task in before.tasks}
    specs_after = {task.name: task for task in after.tasks}
    changes = []
    for pair in pairs:
        if pair.before is not None and pair.after is not None:
            facts = _interface_facts(specs_before[pair.before], specs_after[pair.after])
            if facts:
                changes.append(TaskChange(pair, facts))
    order = [pair.after for pair in pairs if pair.in_both]
    as_after = [name for name in after.task_names if name in order]
    return TasksDiff(pairs=pairs, is_reordered=order != as_after, changes=tuple(changes))


def _signatures(manifest: Manifest, weights: Sequence[Weight]) -> dict[str, _Signature]:
    """By task: shapes and checksums of the weights that it alone has, and its outputs; None where it has none."""
    own: dict[str, list[tuple[Hashable, ...]]] = {task.name: [] for task in manifest.tasks}
    for weight in weights:
        if weight.task is not None:
            tensor = weight.tensor
            own[weight.task].append((tensor.kind, tensor.logical_shape, tensor.sha256()))
    return {
        task.name: (_shapes(task), tuple(sorted(own[task.name], key=str))) if own[task.name] else None
        for task in manifest.tasks
    }


def _shapes(task: TaskSpec) -> Hashable:
    routing = task.routing_weights
    return task.prediction.shape, None if routing is None else routing.shape


def _pair(before: Mapping[str, _Signature], after: Mapping[str, _Signature]) -> tuple[TaskPair, ...]:
    found = {name: name for name in before if name in after and before[name] == after[name]}
    free_before = [name for name in before if name not in found]
    free_after = [name for name in after if name not in found.values()]
    times_before = Counter(before.values())
    times_after = Counter(after.values())
    by_signature = {after[name]: name for name in free_after}
    for name in free_before:
        signature = before[name]
        if signature is None or times_before[signature] != 1 or times_after[signature] != 1:
            continue
        if signature in by_signature:
            found[name] = by_signature[signature]
    taken = set(found.values())
    found |= {name: name for name in free_before if name not in found and name in after and name not in taken}
    taken = set(found.values())
    pairs = [TaskPair(name, found.get(name)) for name in before]
    return (*pairs, *(TaskPair(None, name) for name in after if name not in taken))


def _interface_facts(before: TaskSpec, after: TaskSpec) -> tuple[Fact, ...]:
    facts = _tensor_facts("prediction", before.prediction, after.prediction)
    facts += _tensor_facts("routing weights", before.routing_weights, after.routing_weights)
    return tuple(facts)


def _tensor_facts(what: str, before: TensorSpec | None, after: TensorSpec | None) -> list[Fact]:
    old, new = (None if spec is None else spec.shape for spec in (before, after))
    facts = [Fact(f"{what} shape", old, new)] if old != new else []
    kinds = tuple(None if spec is None else spec.dtype for spec in (before, after))
    if kinds[0] != kinds[1] and None not in kinds:
        facts.append(Fact(f"{what} dtype", *kinds))
    return facts

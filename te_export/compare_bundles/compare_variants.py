"""What changed in the variants of two bundles: form, rewriting, graphs, kept weights, parity, accuracy, pruning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from te_export.compare_bundles.graph_file import read_graph
from te_export.compare_bundles.result import (
    AccuracyChange,
    Fact,
    GraphChange,
    GraphKind,
    ParityChange,
    PrunedChange,
    TaskPair,
    VariantChange,
    VariantSide,
)
from te_runtime.bundle import Bundle
from te_runtime.manifest import (
    Manifest,
    Precision,
    PrunedGraph,
    TaskAccuracy,
    TaskGraphs,
    TaskParity,
    Variant,
)

__all__ = ["compare_variants", "folder_bytes"]


def compare_variants(a: Bundle, b: Bundle, tasks: Sequence[TaskPair]) -> tuple[VariantChange, ...]:
    """Every precision of either bundle, A's first.

    Raises:
        BundleError: a graph cannot be read.
    """
    before = {variant.precision: variant for variant in a.manifest.variants}
    after = {variant.precision: variant for variant in b.manifest.variants}
    common = tuple(pair for pair in tasks if pair.in_both)
    found = []
    for precision in dict.fromkeys((*before, *after)):
        old, new = before.get(precision), after.get(precision)
        sides = _side(a.manifest, old), _side(b.manifest, new)
        if old is None or new is None:
            found.append(VariantChange(precision, *sides))
        else:
            found.append(_compare(a, b, (old, new), sides, common))
    return tuple(found)


def folder_bytes(manifest: Manifest, precision: Precision) -> int:
    """Size of a variant's folder."""
    return sum(entry.size_bytes for entry in manifest.files if entry.path.startswith(f"{precision}/"))


def _side(manifest: Manifest, variant: Variant | None) -> VariantSide | None:
    if variant is None:
        return None
    size_bytes = folder_bytes(manifest, variant.precision)
    return VariantSide(variant.form, variant.optimized, variant.target_provider, size_bytes)


def _compare(
    a: Bundle,
    b: Bundle,
    variants: tuple[Variant, Variant],
    sides: tuple[VariantSide | None, VariantSide | None],
    tasks: Sequence[TaskPair],
) -> VariantChange:
    old, new = variants
    graphs = list(_common_graphs(old, new, tasks))
    return VariantChange(
        precision=old.precision,
        before=sides[0],
        after=sides[1],
        facts=tuple(_facts(old, new)),
        kept_added=tuple(name for name in new.kept_weights if name not in old.kept_weights),
        kept_removed=tuple(name for name in old.kept_weights if name not in new.kept_weights),
        graphs=tuple(_graph_changes(a, b, variants, graphs)),
        compared_graphs=len(graphs),
        parity=tuple(_parity_changes(old, new, tasks)),
        accuracy=tuple(_accuracy_changes(old, new, tasks)),
        pruned=tuple(_pruned_changes(old, new, tasks)),
    )


def _facts(old: Variant, new: Variant) -> Iterator[Fact]:
    for name, before, after in (
        ("form", old.form, new.form),
        ("optimized", old.optimized, new.optimized),
        ("target provider", old.target_provider, new.target_provider),
        ("trunk", old.trunk is not None, new.trunk is not None),
        ("standalone graphs", _has_standalone(old), _has_standalone(new)),
    ):
        if before != after:
            yield Fact(name, before, after)


def _has_standalone(variant: Variant) -> bool:
    return any(graphs.standalone is not None for graphs in variant.tasks)


_GraphPair = tuple[GraphKind, TaskPair | None, str, str]


def _common_graphs(old: Variant, new: Variant, tasks: Iterable[TaskPair]) -> Iterator[_GraphPair]:
    """The graphs in both; not the standalone ones, which are the task graphs again."""
    yield "joint", None, old.joint.path, new.joint.path
    if old.trunk is not None and new.trunk is not None:
        yield "trunk", None, old.trunk.path, new.trunk.path
    if old.joint_tails is not None and new.joint_tails is not None:
        yield "joint-tails", None, old.joint_tails.path, new.joint_tails.path
    for pair, before, after in _task_graphs(old, new, tasks):
        yield "task", pair, before.graph.path, after.graph.path
        if old.trunk is not None and new.trunk is not None:
            yield "tail", pair, before.tail.path, after.tail.path
        if before.pruned is not None and after.pruned is not None:
            yield "pruned", pair, before.pruned.graph.path, after.pruned.graph.path


def _task_graphs(
    old: Variant, new: Variant, tasks: Iterable[TaskPair]
) -> Iterator[tuple[TaskPair, TaskGraphs, TaskGraphs]]:
    before = {graphs.task: graphs for graphs in old.tasks}
    after = {graphs.task: graphs for graphs in new.tasks}
    for pair in tasks:
        if pair.before is not None and pair.after is not None:
            yield pair, before[pair.before], after[pair.after]


def _graph_changes(
    a: Bundle, b: Bundle, variants: tuple[Variant, Variant], graphs: Iterable[_GraphPair]
) -> Iterator[GraphChange]:
    sums = [{entry.path: entry.sha256 for entry in bundle.manifest.files} for bundle in (a, b)]
    for kind, task, path_before, path_after in graphs:
        if sums[0][path_before] == sums[1][path_after]:
            continue
        old = read_graph(a, path_before, variants[0].weights)
        new = read_graph(b, path_after, variants[1].weights)
        if old.structure_sha256 != new.structure_sha256:
            yield GraphChange(kind, task, path_before, path_after, old.operators, new.operators)


def _parity_changes(old: Variant, new: Variant, tasks: Iterable[TaskPair]) -> Iterator[ParityChange]:
    before = {parity.task: parity for parity in old.parity}
    after = {parity.task: parity for parity in new.parity}
    for pair in tasks:
        if pair.before is None or pair.after is None:
            continue
        one, other = before[pair.before], after[pair.after]
        if one._replace(task="") != other._replace(task=""):
            yield ParityChange(pair, _over_bound(one), _over_bound(other))


def _over_bound(parity: TaskParity) -> float:
    """The largest error over its bound; where the bound is 0, so was the error of what passed."""
    groups = [group for output in parity.outputs.values() for group in output.groups]
    return max((group.max_abs_error / group.bound for group in groups if group.bound > 0), default=0.0)


def _accuracy_changes(old: Variant, new: Variant, tasks: Iterable[TaskPair]) -> Iterator[AccuracyChange]:
    before = {accuracy.task: accuracy for accuracy in old.accuracy}
    after = {accuracy.task: accuracy for accuracy in new.accuracy}
    for pair in tasks:
        one, other = before.get(pair.before or ""), after.get(pair.after or "")
        if _nameless(one) != _nameless(other):
            yield _accuracy_change(pair, one, other)


def _nameless(accuracy: TaskAccuracy | None) -> TaskAccuracy | None:
    return None if accuracy is None else accuracy._replace(task="")


def _accuracy_change(
    pair: TaskPair, before: TaskAccuracy | None, after: TaskAccuracy | None
) -> AccuracyChange:
    facts: list[Fact] = []
    if before is not None and after is not None:
        for name, old, new in (
            ("metric", before.metric, after.metric),
            ("rows from", before.source, after.source),
            ("rows", before.rows, after.rows),
        ):
            if old != new:
                facts.append(Fact(name, old, new))
    losses = [None if one is None else one.loss_points for one in (before, after)]
    return AccuracyChange(pair, losses[0], losses[1], tuple(facts))


def _pruned_changes(old: Variant, new: Variant, tasks: Iterable[TaskPair]) -> Iterator[PrunedChange]:
    for pair, before, after in _task_graphs(old, new, tasks):
        one, other = before.pruned, after.pruned
        if _pruned_facts(one) != _pruned_facts(other):
            accuracy = [None if pruned is None else pruned.accuracy for pruned in (one, other)]
            parity = [None if pruned is None else _over_bound(pruned.parity) for pruned in (one, other)]
            yield PrunedChange(
                task=pair,
                experts_before=None if one is None else one.experts,
                experts_after=None if other is None else other.experts,
                loss=_accuracy_change(pair, accuracy[0], accuracy[1]),
                parity=ParityChange(pair, parity[0], parity[1]),
            )


def _pruned_facts(pruned: PrunedGraph | None) -> tuple[object, ...] | None:
    if pruned is None:
        return None
    accuracy, parity = pruned.accuracy._replace(task=""), pruned.parity._replace(task="")
    return pruned.experts, pruned.largest_weights, accuracy, parity

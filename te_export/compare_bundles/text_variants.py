"""What the text says of variants: which there are, how they were made, their graphs, parity, accuracy and pruning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from te_export.compare_bundles.result import (
    AccuracyChange,
    BundleDiff,
    Fact,
    FactValue,
    GraphChange,
    ParityChange,
    TaskPair,
    VariantChange,
    VariantSide,
)
from te_export.compare_bundles.text_layout import NOTHING, escaped, field, some, table
from te_runtime.describe import shown_bytes

__all__ = ["shown_fact", "shown_task", "variant_sections"]

_SHOWN_TASKS = 12


def variant_sections(diff: BundleDiff, *, verbose: bool) -> Iterator[Iterator[str]]:
    """The sections on variants, each empty where there is nothing to tell."""
    changed = [variant for variant in diff.variants if variant.is_different]
    limit = None if verbose else _SHOWN_TASKS
    yield _made_section(changed)
    yield _parity_lines(changed, limit)
    yield _accuracy_lines(changed, limit)
    yield _pruned_lines(changed, limit)


def shown_task(pair: TaskPair) -> str:
    """One name, or both of a renamed task."""
    return " → ".join(dict.fromkeys(name for name in (pair.before, pair.after) if name is not None))


def shown_fact(value: FactValue) -> str:
    """A value for people."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return f"({', '.join(escaped(str(part)) for part in value)})"
    return escaped(str(value))


def _made_section(variants: Sequence[VariantChange]) -> Iterator[str]:
    lines = [line for variant in variants for line in _made_lines(variant)]
    if lines:
        yield "variants"
        yield from lines


def _made_lines(variant: VariantChange) -> Iterator[str]:
    if variant.before is None or variant.after is None:
        side, where = (variant.after, "B") if variant.before is None else (variant.before, "A")
        if side is not None:
            yield from field(variant.precision, f"only in {where}: {_shown_side(side)}")
        return
    told = [_shown_change(fact) for fact in variant.facts]
    for label, names in (("now kept", variant.kept_added), ("no longer kept", variant.kept_removed)):
        if names:
            told.append(f"weights {label} in higher precision: {some([escaped(name) for name in names])}")
    told += _graph_phrases(variant)
    if told:
        yield from field(variant.precision, "; ".join(told))


def _shown_side(side: VariantSide) -> str:
    return (
        f"{side.form}, optimized {side.optimized}, for {side.target_provider}, {shown_bytes(side.size_bytes)}"
    )


def _shown_change(fact: Fact) -> str:
    return f"{fact.name} {shown_fact(fact.before)} → {shown_fact(fact.after)}"


def _graph_phrases(variant: VariantChange) -> Iterator[str]:
    """Nodes of the graphs that have others now; the tasks' graphs of one kind together."""
    kinds: dict[str, list[GraphChange]] = {}
    alike = 0
    for graph in variant.graphs:
        if graph.operators_before == graph.operators_after:
            alike += 1
        else:
            kinds.setdefault(graph.kind, []).append(graph)
    for kind, graphs in kinds.items():
        counts = [
            [sum(operators.values()) for operators in sides]
            for sides in (
                [graph.operators_before for graph in graphs],
                [graph.operators_after for graph in graphs],
            )
        ]
        name = f"{kind} graph" if len(graphs) == 1 else f"{len(graphs)} {kind} graphs"
        yield f"{name} {_span(counts[0])} → {_span(counts[1])} nodes"
    if alike:
        yield (
            f"{alike} of {variant.compared_graphs} graphs: the same operators, other names, shapes or constants"
        )


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _parity_lines(variants: Sequence[VariantChange], limit: int | None) -> Iterator[str]:
    found = [(variant.precision, change) for variant in variants for change in variant.parity]
    if found:
        yield "parity: the largest error over what was allowed"
        yield from _per_task(found, limit)


def _accuracy_lines(variants: Sequence[VariantChange], limit: int | None) -> Iterator[str]:
    found = [(variant.precision, change) for variant in variants for change in variant.accuracy]
    if found:
        yield "accuracy lost, in percentage points"
        yield from _per_task(found, limit)
        yield from _judged_otherwise([change for _, change in found])


def _per_task(found: Sequence[tuple[str, ParityChange | AccuracyChange]], limit: int | None) -> Iterator[str]:
    """A row per variant and task; of many, those with the largest figures."""
    shown = list(found)
    if limit is not None and len(found) > limit:
        shown = sorted(found, key=lambda entry: -max(entry[1].before or 0.0, entry[1].after or 0.0))[:limit]
    rows = [
        (precision, shown_task(change.task), _figure(change.before), _figure(change.after))
        for precision, change in shown
    ]
    yield from table(("variant", "task", "A", "B"), rows, names=2)
    if len(shown) < len(found):
        yield f"  ... the {len(shown)} largest of {len(found)}; -v shows all"


def _judged_otherwise(changes: Sequence[AccuracyChange]) -> Iterator[str]:
    told = dict.fromkeys(_shown_change(fact) for change in changes for fact in change.facts)
    if told:
        yield from field(
            "note",
            f"judged otherwise, so the two losses are no measure of each other: {some(list(told))}",
        )


def _pruned_lines(variants: Sequence[VariantChange], limit: int | None) -> Iterator[str]:
    rows = [
        (
            shown_task(change.task),
            _experts(change.experts_before),
            _experts(change.experts_after),
            _figure(change.loss.before),
            _figure(change.loss.after),
        )
        for variant in variants
        for change in variant.pruned
    ]
    if rows:
        yield "pruned graphs: experts that are gone, and points lost by it"
        yield from table(("task", "gone in A", "gone in B", "lost in A", "lost in B"), rows[:limit], names=3)
        if limit is not None and len(rows) > limit:
            yield f"  ... and {len(rows) - limit} more; -v shows all"
        yield from _judged_otherwise([change.loss for variant in variants for change in variant.pruned])


def _experts(experts: tuple[int, ...] | None) -> str:
    return "no such graph" if experts is None else ", ".join(map(str, experts))


def _figure(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"

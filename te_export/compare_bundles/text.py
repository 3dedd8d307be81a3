"""What `te-export diff` prints for people, on a terminal and in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from te_export.compare_bundles.result import BundleDiff, BundleSide, Fact, FileChange, TasksDiff
from te_export.compare_bundles.text_latency import latency_lines
from te_export.compare_bundles.text_layout import NOTHING, escaped, field, ratio, some, table
from te_export.compare_bundles.text_variants import shown_fact, shown_task, variant_sections
from te_export.compare_bundles.text_weights import weights_lines
from te_runtime.describe import shown_bytes

__all__ = ["diff_lines"]

_SHA256_SHOWN = 12
_SHOWN_TASKS = 12


def diff_lines(diff: BundleDiff, *, verbose: bool) -> Iterator[str]:
    """The lines to print."""
    if not diff.is_different:
        yield _no_differences(diff)
        if not diff.latency.is_same:
            yield ""
            yield from latency_lines(diff, verbose=verbose)
        return
    yield from _heading("A", diff.a)
    yield from _heading("B", diff.b)
    for lines in (
        _model_lines(diff),
        _tasks_lines(diff.tasks),
        weights_lines(diff, verbose=verbose),
        *variant_sections(diff, verbose=verbose),
        _routing_lines(diff, verbose=verbose),
        _size_lines(diff, verbose=verbose),
        latency_lines(diff, verbose=verbose),
    ):
        section = list(lines)
        if section:
            yield ""
            yield from section


def _no_differences(diff: BundleDiff) -> str:
    if diff.a.manifest_sha256 == diff.b.manifest_sha256:
        return "no differences"
    apart = [file.path for file in diff.files if not file.is_same]
    apart += [] if diff.latency.is_same else ["measured latency"]
    return f"no differences in what the bundles compute; other: {', '.join(apart) or 'figures of the check'}"


def _heading(name: str, side: BundleSide) -> Iterator[str]:
    tasks = f"{len(side.tasks)} task{'' if len(side.tasks) == 1 else 's'}"
    yield f"{name}  {escaped(side.path)}"
    yield f"   {escaped(side.family)}, {tasks}, {shown_bytes(side.size_bytes)}"


def _model_lines(diff: BundleDiff) -> Iterator[str]:
    facts = [*diff.model, *(Fact(f"input {fact.name}", fact.before, fact.after) for fact in diff.inputs)]
    if not facts:
        yield "model: the same checkpoint, config and inputs, written by the same versions"
        return
    yield "model"
    yield from table(("", "A", "B"), (_fact_row(fact) for fact in facts), names=3)
    names = {fact.name for fact in diff.model}
    unchanged = [
        label
        for label, found in (
            ("checkpoint", "checkpoint sha256" in names),
            ("family", "family" in names),
            ("config", any(name.startswith("config.") for name in names)),
            ("inputs", bool(diff.inputs)),
            ("opset", "opset" in names),
            ("versions", any(name.endswith(" version") for name in names)),
        )
        if not found
    ]
    if unchanged:
        yield from field("unchanged", ", ".join(unchanged))


def _fact_row(fact: Fact) -> tuple[str, str, str]:
    if fact.name == "unused parameters":
        counts = [len(value) if isinstance(value, tuple) else 0 for value in (fact.before, fact.after)]
        return (fact.name, str(counts[0]), str(counts[1]))
    cells = [shown_fact(value) for value in (fact.before, fact.after)]
    if fact.name == "checkpoint sha256":
        cells = [f"{cell[:_SHA256_SHOWN]}..." for cell in cells]
    return (escaped(fact.name), cells[0], cells[1])


def _tasks_lines(tasks: TasksDiff) -> Iterator[str]:
    if not tasks.is_different:
        yield f"tasks: the same {len(tasks.pairs)}, with the same shapes"
        return
    yield "tasks"
    if tasks.removed:
        yield from field("only in A", some(tasks.removed))
    if tasks.added:
        yield from field("only in B", some(tasks.added))
    if tasks.renamed:
        names = some([shown_task(pair) for pair in tasks.renamed])
        yield from field("renamed", f"{names}: their own weights are the same bytes")
    if tasks.is_reordered:
        yield from field("reordered", "the tasks in both stand in another order")
    if tasks.changes:
        rows = [
            (shown_task(change.task), fact.name, shown_fact(fact.before), shown_fact(fact.after))
            for change in tasks.changes
            for fact in change.facts
        ]
        yield from table(("task", "", "A", "B"), rows, names=4)
    same = len(tasks.in_both) - len(tasks.renamed) - len(tasks.changes)
    if same > 0:
        yield from field("in both", f"{same} with the same name and shapes")


def _routing_lines(diff: BundleDiff, *, verbose: bool) -> Iterator[str]:
    if not diff.routing:
        return
    yield "routing: how far the mean routing weights moved, from 0 (not) to 1 (to other experts)"
    order = sorted(
        diff.routing, key=lambda change: -(change.distance if change.distance is not None else 2.0)
    )
    shown = order if verbose else order[:_SHOWN_TASKS]
    rows = [
        (shown_task(change.task), "not comparable" if change.distance is None else f"{change.distance:.3f}")
        for change in shown
    ]
    yield from table(("task", "moved"), rows)
    if len(shown) < len(order):
        yield f"  ... and {len(order) - len(shown)} that moved less; -v shows all"


def _size_lines(diff: BundleDiff, *, verbose: bool) -> Iterator[str]:
    yield "size"
    rows = [("bundle", diff.a.size_bytes, diff.b.size_bytes)]
    for variant in diff.variants:
        sides = [None if side is None else side.size_bytes for side in (variant.before, variant.after)]
        rows.append((variant.precision, sides[0] or 0, sides[1] or 0))
        rows += [
            (f"  {file.path}", file.before_bytes or 0, file.after_bytes or 0)
            for file in diff.files
            if file.path == f"{variant.precision}/weights.bin"
            or (verbose and _is_of(file, variant.precision))
        ]
    drawn = ((name, _shown_size(a), _shown_size(b), ratio(a, b or None)) for name, a, b in rows)
    yield from table(("", "A", "B", "B/A"), drawn)
    golden = "" if diff.golden_is_same else "; the golden rows are others"
    yield from field("files", f"{_file_counts(diff.files)}{golden}")


def _is_of(file: FileChange, precision: str) -> bool:
    return file.path.startswith(f"{precision}/") and file.before_bytes != file.after_bytes


def _shown_size(size_bytes: int) -> str:
    return shown_bytes(size_bytes) if size_bytes else NOTHING


def _file_counts(files: Iterable[FileChange]) -> str:
    counts = {"the same": 0, "with other bytes": 0, "only in A": 0, "only in B": 0}
    for file in files:
        if file.after_bytes is None:
            counts["only in A"] += 1
        elif file.before_bytes is None:
            counts["only in B"] += 1
        else:
            counts["the same" if file.is_same else "with other bytes"] += 1
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)

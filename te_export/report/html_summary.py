"""The first lines of report.html: what somebody who was handed the bundle wants to know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from te_export.options import FailedVariant
from te_export.report.html_files import folder_bytes
from te_export.report.html_parity import worst_group
from te_export.report.latency_figures import measured_on, microseconds, timed_graphs
from te_export.report.variant_figures import judged_rows
from te_runtime.manifest import Latency, Manifest, Variant

__all__ = ["summary_sentences"]

_NAMED = 6


def summary_sentences(manifest: Manifest, left_out: Sequence[FailedVariant] = ()) -> Iterator[str]:
    """A sentence or two for each: what it is, how exact, how large, what lower precision costs, what is left out, how
    fast, what is pruned.
    """
    yield _what(manifest)
    yield _exactness(manifest.variants[0])
    yield _sizes(manifest)
    for variant in manifest.variants[1:]:
        yield _lower_precision(manifest, variant)
    if left_out:
        names = [failed.precision for failed in left_out]
        yield f"Asked for and left out: {', '.join(names)}. Why is told with the variants."
    if manifest.latency is not None:
        yield _latency(manifest, manifest.latency)
    pruned = [graphs.task for graphs in manifest.variants[0].tasks if graphs.pruned is not None]
    if pruned:
        tasks = "every task" if len(pruned) == len(manifest.tasks) else _names(pruned)
        yield (
            f"For {tasks} there is one more graph, without experts that the task hardly uses. It is not the model's "
            "function, and is used only where it is asked for."
        )


def _what(manifest: Manifest) -> str:
    names = manifest.task_names
    answers = f"one task, {names[0]}" if len(names) == 1 else f"{len(names)} tasks: {_names(names)}"
    return (
        f"This bundle holds the model {manifest.model.family} as ONNX graphs. It answers {answers}. "
        "It runs wherever ONNX Runtime runs, without torch."
    )


def _exactness(variant: Variant) -> str:
    rows = sum(group.rows for group in variant.parity[0].prediction.groups)
    checked = (
        f"Before it was written, each {variant.precision} graph was run over {rows} rows and compared with the same "
        "model in torch float64."
    )
    worst = worst_group(variant.parity)
    if worst is None:
        return checked
    ratios = [ratio for parity in variant.parity if (ratio := parity.worst_ratio) is not None]
    beside = f" At worst an error is {max(ratios):.2f} times torch's own in float32." if ratios else ""
    return (
        f"{checked} At most {worst.share:.0%} of the error that was allowed was used: by {worst.task}, "
        f"{worst.output}, {worst.group} rows.{beside}"
    )


def _sizes(manifest: Manifest) -> str:
    names = [variant.precision for variant in manifest.variants]
    total = sum(entry.size_bytes for entry in manifest.files)
    held = f"the variant {names[0]}" if len(names) == 1 else f"the variants {', '.join(names)}"
    return f"It holds {held} and takes {total / 1e6:.1f} MB."


def _lower_precision(manifest: Manifest, variant: Variant) -> str:
    whole = folder_bytes(manifest, manifest.variants[0].precision)
    size = f"{variant.precision} takes {folder_bytes(manifest, variant.precision) / whole:.2f} of the bytes of fp32."
    if not variant.accuracy:
        return size
    worst = max(variant.accuracy, key=lambda entry: entry.loss_points)
    caveat = (
        " Random rows show a broken variant and not its accuracy: try it on your own data."
        if worst.source == "probe rows"
        else ""
    )
    lost = f"{worst.loss_points:.2f} of the {worst.budget_points:g} percentage points allowed"
    return f"{size} {worst.task} loses most in it: {lost}, over {judged_rows(variant)}.{caveat}"


def _latency(manifest: Manifest, latency: Latency) -> str:
    """All tasks for the smallest batch that was timed, variant by variant."""
    joint = [timed for timed in timed_graphs(manifest) if timed.task is None]
    fewest = min((timed.figures.batch for timed in joint), default=0)
    shown = ", ".join(
        f"{microseconds(timed.figures.p50_us)} in {timed.precision}"
        for timed in joint
        if timed.figures.batch == fewest
    )
    rows = "one row" if fewest == 1 else f"{fewest} rows"
    return f"All tasks for {rows} at a time took {shown or 'an unknown time'}, on {measured_on(latency)}."


def _names(names: tuple[str, ...] | list[str]) -> str:
    left = len(names) - _NAMED
    return ", ".join(names) if left <= 0 else f"{', '.join(names[:_NAMED])} and {left} more"

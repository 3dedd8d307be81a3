"""Adding the variants of lower precision to a staged bundle whose fp32 variant has been verified.

    fp32 graphs → precision/variants.py → staged files → agreement of its graphs → manifest entry

A variant that cannot be built within its budget is left out and told of; the others are kept.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from te_export.bundle.accuracy_entry import accuracy_entry
from te_export.bundle.manifest_writer import build_variant
from te_export.bundle.staged_graphs import StagedGraphs
from te_export.bundle.staging import StagedBundle
from te_export.bundle.variant_writer import write_variant
from te_export.errors import AccuracyError, GateError
from te_export.options import ExportOptions, FailedVariant, VariantSummary
from te_export.partition import GraphSet
from te_export.precision.evaluation import Evaluation
from te_export.precision.float16.load_probe import check_loads_are_survived
from te_export.precision.variants import build_variant_graphs
from te_export.progress import Steps
from te_export.verify.parity import verify_lower_precision
from te_export.verify.references import References
from te_runtime.errors import BundleError
from te_runtime.manifest import Precision, Variant

__all__ = ["AddedVariants", "add_variants"]


@dataclass(frozen=True)
class AddedVariants:
    """What came of the variants that were asked for beside fp32; notes as in BuiltVariant."""

    variants: tuple[Variant, ...] = ()
    summaries: tuple[VariantSummary, ...] = ()
    failed: tuple[FailedVariant, ...] = ()
    notes: tuple[str, ...] = ()
    timing_notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Added:
    variant: Variant
    summary: VariantSummary
    notes: tuple[str, ...]
    timing_notes: tuple[str, ...]


def add_variants(
    staged: StagedBundle,
    fp32: GraphSet,
    references: References,
    evaluation: Evaluation,
    *,
    options: ExportOptions,
    steps: Steps,
) -> AddedVariants:
    """Build, write and verify each variant of lower precision that `options` asks for.

    Raises:
        OutputError: the bundle cannot be written.
    """
    added: list[_Added] = []
    failed: list[FailedVariant] = []
    for precision in options.lower_precisions:
        with steps.step(precision) as step:
            try:
                found = _add(precision, staged, fp32, references, evaluation, options)
            except GateError as error:
                staged.discard(precision)
                failed.append(FailedVariant(precision, _reason(precision, error, staged)))
                step.detail = "left out"
            else:
                added.append(found)
                step.detail = _detail(found)
    return AddedVariants(
        variants=tuple(found.variant for found in added),
        summaries=tuple(found.summary for found in added),
        failed=tuple(failed),
        notes=tuple(note for found in added for note in found.notes),
        timing_notes=tuple(note for found in added for note in found.timing_notes),
    )


def _add(
    precision: Precision,
    staged: StagedBundle,
    fp32: GraphSet,
    references: References,
    evaluation: Evaluation,
    options: ExportOptions,
) -> _Added:
    with staged.scratch() as scratch:
        built = build_variant_graphs(precision, fp32, evaluation, scratch)
    files = write_variant(staged, built.graphs, folder=precision, standalone=options.standalone)
    if precision == "fp16":
        _check_loads(files)
    parity = verify_lower_precision(precision, files, references)
    return _Added(
        variant=build_variant(
            precision,
            files,
            parity,
            optimized=options.optimize,
            target_provider=options.provider,
            form=built.form,
            kept_weights=built.kept,
            accuracy=tuple(
                accuracy_entry(task, figures, evaluation) for task, figures in built.figures.items()
            ),
            layers=built.layers,
        ),
        summary=VariantSummary(
            precision=precision,
            form=built.form,
            size_bytes=_folder_bytes(staged, precision),
            converted=built.converted,
            latencies=built.latencies,
        ),
        notes=built.notes,
        timing_notes=built.timing_notes,
    )


def _check_loads(files: StagedGraphs) -> None:
    try:
        check_loads_are_survived(files.files)
    except BundleError as error:
        raise AccuracyError(f"fp16 is left out: {error}") from error


def _reason(precision: Precision, error: GateError, staged: StagedBundle) -> str:
    """Why a variant is left out; without the folder it was staged in, whose name is another each time."""
    told = str(error).replace(f"{staged.root}{os.sep}", "")
    return told if told.startswith((f"{precision} ", f"{precision}:")) else f"{precision} is left out: {told}"


def _folder_bytes(staged: StagedBundle, folder: str) -> int:
    return sum(entry.size_bytes for entry in staged.files if entry.path.startswith(f"{folder}/"))


def _detail(found: _Added) -> str:
    variant, summary = found.variant, found.summary
    worst = max(variant.accuracy, key=lambda entry: entry.loss_points)
    return (
        f"{variant.form}, {len(summary.converted)} weights, {summary.size_bytes / 1e6:.1f} MB, "
        f"{worst.task} loses most: {worst.loss_points:.2f} points"
    )

"""The whole export on one screen. Each stage is a function from dataclass to dataclass; read on in the
modules they come from.

    checkpoint or module → model → capture → rewrite → partition → rewrite → structure → references → (pruned graphs) →
    staged files → parity → further precisions → (latency) → manifest → published bundle

Parity is checked on the staged files themselves, opened the way te_runtime opens them, after the torch
model has been let go: what was verified is what is shipped, and memory never holds both.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from te_export.add_latency import AddedLatency, measure_latency, staged_opener
from te_export.add_pruned import AddedPruned, add_pruned, pruned_entries
from te_export.add_variants import AddedVariants, add_variants
from te_export.bundle.golden import GOLDEN_NAME, golden_file
from te_export.bundle.manifest_writer import build_manifest, build_variant, model_info
from te_export.bundle.staged_graphs import StagedGraphs
from te_export.bundle.staging import StagedBundle, check_target, leftovers
from te_export.bundle.variant_writer import write_variant
from te_export.capture.opset import choose_opset
from te_export.capture.torch_capture import capture
from te_export.checkpoint import read_checkpoint
from te_export.errors import UsageError
from te_export.load_model import load_model
from te_export.models.exportable import ExportableModel
from te_export.modules.example_inputs import Example
from te_export.options import ExportOptions, ExportResult
from te_export.partition import GraphSet, partition
from te_export.precision.accuracy import evaluate_oracle
from te_export.precision.calibration_data import CalibrationData, read_calibration_data
from te_export.precision.evaluation import Evaluation, probe_evaluation
from te_export.progress import Progress, SilentProgress, Steps
from te_export.report.html import HTML_REPORT_NAME, render_html
from te_export.report.markdown import REPORT_NAME, render_report
from te_export.rewrite.log import RewriteLog
from te_export.rewrite.rewrite import rewrite, rewrite_cut
from te_export.verify.eager import check_eager
from te_export.verify.parity import verify_graphs
from te_export.verify.probe_rows import ORDINARY, make_probe_rows
from te_export.verify.reachability import check_reachability
from te_export.verify.references import References, evaluate_references, utilization
from te_export.verify.structure import check_structure
from te_export.verify.tolerance import Tolerance
from te_export.verify.torch_threads import reference_threads
from te_runtime.manifest import (
    MANIFEST_NAME,
    Golden,
    Manifest,
    ModelInfo,
    Variant,
    parse_manifest,
    serialize_manifest,
)

__all__ = ["default_output", "export"]


@dataclass(frozen=True)
class _Written:
    """What is kept once the graphs are staged: files, figures and reference outputs, but no torch model.

    Attributes:
        lower: what variants of lower precision are made from; None where none is asked for, so that no
            weights are held.
    """

    info: ModelInfo
    notes: tuple[str, ...]
    graphs: StagedGraphs
    references: References
    rewrites: RewriteLog
    pruned: AddedPruned
    lower: _LowerPrecision | None


@dataclass(frozen=True)
class _LowerPrecision:
    graphs: GraphSet
    evaluation: Evaluation


def default_output(checkpoint: Path) -> Path:
    """`<checkpoint stem>-onnx` beside the checkpoint."""
    return checkpoint.with_name(f"{checkpoint.stem}-onnx")


def export(
    checkpoint: str | Path | nn.Module,
    output: str | Path | None = None,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
    *,
    example_inputs: Example | None = None,
    task_names: Sequence[str] | None = None,
) -> ExportResult:
    """Turn a checkpoint or a module into a verified bundle.

    Args:
        checkpoint: a .pt, .pth, .safetensors or .pt2 file, or a torch module on the CPU, which stays as it is.
        output: the folder to make; None for `<checkpoint stem>-onnx` beside the checkpoint.
        options: what to export and how; None for the defaults.
        progress: told of each step; None for silence.
        example_inputs: for a module, what its forward takes: a tensor or array (B, …), a dict from name to one, a
            tuple of them, or an .npz file of them. B is at least 1; floats are taken as float32.
        task_names: as in the options.

    Returns:
        Where the bundle is, and what its manifest says.

    Raises:
        UsageError: an option does not fit the checkpoint.
        CheckpointError: the checkpoint cannot be read or exported.
        OutputError: the bundle cannot be written there.
        GateError: a graph could not be captured, lost a part of the model, or is not exact enough. Nothing
            is published.
    """
    options = options or ExportOptions()
    if isinstance(task_names, str):
        raise UsageError(
            f"task_names: got the text {task_names!r:.80}, expected names: pass ({task_names!r:.80},)"
        )
    if task_names is not None:
        options = replace(options, task_names=tuple(task_names))
    tolerance = Tolerance(options.atol, options.rtol)
    source = checkpoint if isinstance(checkpoint, nn.Module) else Path(checkpoint)
    target = _target(source, output)
    steps = Steps(progress or SilentProgress())
    check_target(target, force=options.force)
    opset = choose_opset(options.opset)
    notes = [f"{path} was left by an export; remove it if none is running" for path in leftovers(target)]
    with StagedBundle(target, force=options.force) as staged:
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's own mode is
            written = _write_graphs(source, options, opset, staged, steps, example_inputs)
        gc.collect()  # torch's graphs hold the weights in reference cycles
        with steps.step("verify") as step:
            parity = verify_graphs(written.graphs, written.references, tolerance)
            pruned = pruned_entries(written.pruned, written.graphs, written.references)
            step.detail = (
                f"{len(written.references.rows)} rows through every graph at batch sizes 1, 2, 7 and 64"
            )
        added = _add_lower_precisions(staged, written, options, steps)
        fp32 = build_variant(
            "fp32",
            written.graphs,
            parity,
            optimized=options.optimize,
            target_provider=options.provider,
            pruned=pruned,
        )
        variants = (fp32, *added.variants)
        timed = _measure_latency(staged, written, variants, steps) if options.measure_latency else None
        with steps.step("publish") as step:
            manifest = _write_manifest(staged, written, variants, added=added, timed=timed, opset=opset)
            if not options.dry_run:
                staged.publish()
            step.detail = "nothing (dry run)" if options.dry_run else str(target)
    return ExportResult(
        bundle=target,
        published=not options.dry_run,
        manifest=manifest,
        task_size_bytes=dict(written.graphs.task_size_bytes),
        notes=(*notes, *written.notes, *added.notes, *added.timing_notes, *(timed.notes if timed else ())),
        size_bytes=sum(entry.size_bytes for entry in staged.files),
        step_seconds=steps.seconds,
        rewrites=written.rewrites,
        variants=added.summaries,
        failed_variants=added.failed,
        pruning=written.pruned.tasks,
    )


def _named(target: Path) -> Path:
    """`.` and `..` under their own names: what is written beside a folder must not land inside it."""
    return target.resolve() if target.name in ("", "..") else target


def _target(source: Path | nn.Module, output: str | Path | None) -> Path:
    if isinstance(source, nn.Module):
        if output is None:
            raise UsageError("output: a module has no file to put the bundle beside; name the folder to make")
        return _named(Path(output))
    _require_file(source)
    return _named(Path(output) if output is not None else default_output(source))


def _require_file(source: Path) -> None:
    """Say what is wrong with the path before anything is said of the output folder."""
    if not os.path.isfile(source):  # noqa: PTH113 - unlike Path.is_file, it raises for no name whatever
        read_checkpoint(source)  # it knows what is there instead


def _write_graphs(
    source: Path | nn.Module,
    options: ExportOptions,
    opset: int,
    staged: StagedBundle,
    steps: Steps,
    example: Example | None,
) -> _Written:
    with steps.step("read") as step:
        loaded = load_model(source, options, example)
        model = loaded.model
        data = _read_data(model, options)
        step.detail = _told(model)
    with steps.step("capture") as step:
        captured = capture(model, opset)
        step.detail = f"one graph of {len(captured.model.graph)} nodes, opset {opset}"
    with steps.step("rewrite") as step:
        rewritten = rewrite(captured, provider=options.provider, level=options.optimize)
        step.detail = f"{len(rewritten.log.applied)} exact rewrites before the cut, for {options.provider}"
    with steps.step("partition") as step:
        graphs, rewrites = rewrite_cut(
            partition(rewritten.graph),
            captured,
            rewritten.log,
            provider=options.provider,
            level=options.optimize,
        )
        prove = check_reachability if model.expert_features is None else check_structure
        prove(graphs, model, captured)
        kinds = "joint, task" if graphs.trunk is None else "joint, trunk, task, tail, joint tails"
        step.detail = f"{len(graphs.models)} graphs ({kinds}), nothing lost in any"
    with steps.step("reference") as step, reference_threads(model.row_cost_bytes):
        references = evaluate_references(model, make_probe_rows(model))
        if model.eager is not None:
            check_eager(model, references)
        evaluation = probe_evaluation(references) if data is None else _evaluate(model, data, options)
        step.detail = f"{len(references.rows)} rows through torch in float64 and float32"
    pruned = AddedPruned()
    if options.prune_experts is not None:
        with steps.step("prune") as step:
            pruned = add_pruned(staged, captured, graphs, model, evaluation, options, references)
            step.detail = pruned.detail
    with steps.step("write") as step:
        files = write_variant(
            staged, graphs, folder="fp32", standalone=options.standalone, pruned=pruned.models
        )
        step.detail = (
            f"{len(staged.files)} files, {sum(entry.size_bytes for entry in staged.files) / 1e6:.1f} MB"
        )
    return _Written(
        info=model_info(model, loaded.sha256),
        notes=(*model.notes, *pruned.notes),
        graphs=files,
        references=references,
        rewrites=rewrites,
        pruned=pruned.without_models(),
        lower=_LowerPrecision(graphs, evaluation) if options.lower_precisions else None,
    )


def _told(model: ExportableModel) -> str:
    experts = sorted({task.num_experts for task in model.tasks if task.num_experts is not None})
    gates = f"{' or '.join(map(str, experts))} experts" if experts else "no gate found"
    return f"{model.family}: {gates}, {len(model.tasks)} tasks"


def _read_data(model: ExportableModel, options: ExportOptions) -> CalibrationData | None:
    path = options.calibration_data
    return None if path is None else read_calibration_data(Path(path), model)


def _evaluate(model: ExportableModel, data: CalibrationData, options: ExportOptions) -> Evaluation:
    return Evaluation(
        source="calibration data",
        x=data.judged_rows,
        tasks=evaluate_oracle(model, data.judged_rows, data.judged_labels),
        budget_points=options.max_accuracy_drop,
        calibration=data.calibration_rows,
    )


def _add_lower_precisions(
    staged: StagedBundle, written: _Written, options: ExportOptions, steps: Steps
) -> AddedVariants:
    if written.lower is None:
        return AddedVariants()
    lower = written.lower
    return add_variants(
        staged, lower.graphs, written.references, lower.evaluation, options=options, steps=steps
    )


def _measure_latency(
    staged: StagedBundle, written: _Written, variants: tuple[Variant, ...], steps: Steps
) -> AddedLatency:
    rows = written.references.rows
    start, stop = next((start, stop) for name, start, stop in rows.groups if name == ORDINARY)
    with steps.step("latency") as step:
        timed = measure_latency(variants, rows.x[start:stop], staged_opener(staged.root))
        step.detail = timed.detail
    return timed


def _write_manifest(
    staged: StagedBundle,
    written: _Written,
    variants: tuple[Variant, ...],
    *,
    added: AddedVariants,
    timed: AddedLatency | None,
    opset: int,
) -> Manifest:
    golden, groups = golden_file(written.references, [spec.name for spec in written.graphs.joint.inputs])
    staged.write(GOLDEN_NAME, [golden])
    manifest = build_manifest(
        written.info,
        opset=opset,
        variants=variants,
        golden=Golden(path=GOLDEN_NAME, groups=groups),
        utilization=utilization(written.references),
        files=staged.files,
        latency=None if timed is None else timed.latency,
    )
    told = (*written.notes, *added.notes, *(timed.notes if timed else ()))
    for name, render in ((REPORT_NAME, render_report), (HTML_REPORT_NAME, render_html)):
        text = render(manifest, told, written.rewrites, written.pruned.tasks, left_out=added.failed)
        staged.write(name, [text.encode("utf-8")])
        manifest = manifest._replace(files=staged.files)
    data = serialize_manifest(manifest)
    staged.write(MANIFEST_NAME, [data])
    return parse_manifest(data, MANIFEST_NAME)

"""What the command line prints of a bundle, a verification and a run: text for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from te_runtime.inputs import shown_shape
from te_runtime.interfaces import variant_graphs
from te_runtime.manifest import GroupParity, Manifest, TensorSpec, Variant

if TYPE_CHECKING:
    from te_runtime.bundle import Bundle
    from te_runtime.golden import Comparison, VerifyReport
    from te_runtime.prediction import Prediction
    from te_runtime.providers import ProviderChoice

__all__ = [
    "bundle_json",
    "bundle_text",
    "run_json",
    "run_text",
    "shown_bytes",
    "shown_choice",
    "verify_json",
    "verify_text",
]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MAX_ROWS_SHOWN = 3
MAX_VALUES_SHOWN = 8
MAX_MISMATCHES_SHOWN = 10


def shown_bytes(size_bytes: int) -> str:
    """A size for people: `512 bytes`, `8.1 MB` (powers of ten)."""
    if size_bytes < 1000:
        return f"{size_bytes} bytes"
    size = float(size_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.95 or unit == "TB":
            break
    return f"{size:.1f} {unit}"


def bundle_text(bundle: Bundle) -> Iterator[str]:
    """The lines of `te-runtime inspect`."""
    manifest = bundle.manifest
    yield f"{bundle.root.name}: a te-export bundle, format version {manifest.version}"
    yield f"model      {manifest.model.family}, {shown_bytes(manifest.model.parameter_bytes)} of parameters"
    for spec in manifest.inputs:
        yield f"input      {spec.name}: {_shown_tensor(spec)}"
    for task in manifest.tasks:
        weights = task.routing_weights
        routing = f", routing weights {shown_shape(weights.shape)}" if weights else ", no routing weights"
        yield f"task       {task.name}: prediction {_shown_tensor(task.prediction)}{routing}"
    for variant in manifest.variants:
        yield f"variant    {_variant_line(manifest, variant)}"
    groups = ", ".join(f"{group.rows} {group.name}" for group in manifest.golden.groups)
    yield f"golden     {sum(group.rows for group in manifest.golden.groups)} rows to verify with: {groups}"
    yield f"made by    {_producer_line(manifest)}"
    total = shown_bytes(sum(entry.size_bytes for entry in manifest.files))
    checked = "every sha256 matches" if bundle.check == "full" else "sizes match, sha256 not compared"
    yield f"files      {len(manifest.files)} of {total} together; {checked}"
    yield f"manifest   sha256 {bundle.manifest_sha256}"


def bundle_json(bundle: Bundle) -> dict[str, Json]:
    """What `te-runtime inspect --json` prints."""
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.root),
        "format_version": manifest.version,
        "family": manifest.model.family,
        "parameter_bytes": manifest.model.parameter_bytes,
        "inputs": [_tensor_json(spec) for spec in manifest.inputs],
        "tasks": [
            {
                "name": task.name,
                "prediction": _tensor_json(task.prediction),
                "routing_weights": _tensor_json(task.routing_weights) if task.routing_weights else None,
            }
            for task in manifest.tasks
        ],
        "variants": [_variant_json(manifest, variant) for variant in manifest.variants],
        "golden_rows": {group.name: group.rows for group in manifest.golden.groups},
        "producer": manifest.producer._asdict(),
        "checkpoint_sha256": manifest.model.checkpoint_sha256,
        "manifest_sha256": bundle.manifest_sha256,
        "checksums_match": True if bundle.check == "full" else None,
        "files": {entry.path: entry.size_bytes for entry in manifest.files},
    }


def verify_text(name: str, report: VerifyReport) -> Iterator[str]:
    """The lines of `te-runtime verify`."""
    yield (
        f"{name}, {report.precision} on {report.provider}: "
        f"{report.rows} golden rows through {len(report.graphs)} graphs"
    )
    for check in report.tasks:
        state = "ok    " if check.values_out_of_bound == 0 else "FAILED"
        worst = check.worst
        yield (
            f"{state} {check.task}: worst error {worst.ratio:.3g} of what is allowed "
            f"({worst.graph}, {worst.output}, row {worst.row})"
        )
    for mismatch in report.mismatches[:MAX_MISMATCHES_SHOWN]:
        yield _mismatch_line(mismatch)
    hidden = len(report.mismatches) - MAX_MISMATCHES_SHOWN
    if hidden > 0:
        yield f"and {hidden} more mismatches; --json lists them all"


def verify_json(report: VerifyReport) -> dict[str, Json]:
    """What `te-runtime verify --json` prints."""
    return {
        "ok": report.ok,
        "precision": report.precision,
        "provider": report.provider,
        "rows": report.rows,
        "graphs": list(report.graphs),
        "tasks": [
            {
                "task": check.task,
                "ok": check.values_out_of_bound == 0,
                "values_out_of_bound": check.values_out_of_bound,
                "worst": _comparison_json(check.worst),
            }
            for check in report.tasks
        ],
        "mismatches": [_comparison_json(mismatch) for mismatch in report.mismatches],
    }


def shown_choice(choice: ProviderChoice) -> str:
    """Where a model runs, and why if te_runtime was left to decide."""
    device = f" ({choice.device})" if choice.device else ""
    why = f", chosen by auto: {choice.reason}" if choice.asked == "auto" else ""
    return f"on {choice.provider}{device}{why}"


def run_text(predictions: Mapping[str, Prediction], output: Path, choice: ProviderChoice) -> Iterator[str]:
    """The lines of `te-runtime run`."""
    for task, prediction in predictions.items():
        weights = prediction.routing_weights
        routing = f", routing weights {shown_shape(weights.shape)}" if weights is not None else ""
        yield f"{task}: prediction {shown_shape(prediction.output.shape)}{routing}"
        for number, row in enumerate(entry.ravel().tolist() for entry in prediction.output[:MAX_ROWS_SHOWN]):
            shown = "  ".join(f"{value:.4g}" for value in row[:MAX_VALUES_SHOWN])
            more = f"  … {len(row) - MAX_VALUES_SHOWN} more" if len(row) > MAX_VALUES_SHOWN else ""
            yield f"  row {number}: {shown}{more}"
        if len(prediction.output) > MAX_ROWS_SHOWN:
            yield f"  … {len(prediction.output) - MAX_ROWS_SHOWN} more rows"
    first = next(iter(predictions))
    yield f"Ran {shown_choice(choice)}"
    yield f"Wrote {output}"
    yield f'Read it with numpy: numpy.load("{output.name}")["{first}.prediction"]'


def run_json(predictions: Mapping[str, Prediction], output: Path, choice: ProviderChoice) -> dict[str, Json]:
    """What `te-runtime run --json` prints."""
    tasks: dict[str, Json] = {}
    for task, prediction in predictions.items():
        weights = prediction.routing_weights
        tasks[task] = {
            "prediction": list(prediction.output.shape),
            "routing_weights": None if weights is None else list(weights.shape),
        }
    return {"output": str(output), "provider": choice.provider, "tasks": tasks}


def _shown_tensor(spec: TensorSpec) -> str:
    return f"{spec.dtype} {shown_shape(spec.shape)}"


def _tensor_json(spec: TensorSpec) -> Json:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _variant_bytes(manifest: Manifest, variant: Variant) -> int:
    return sum(entry.size_bytes for entry in manifest.files if entry.path.startswith(f"{variant.precision}/"))


def _worst_parity(variant: Variant) -> tuple[str, GroupParity] | None:
    """The group of rows that came closest to its bound, with its task."""
    found = [
        (parity.task, group)
        for parity in variant.parity
        for output in filter(None, (parity.prediction, parity.routing_weights))
        for group in output.groups
    ]
    return max(found, key=lambda entry: _ratio(entry[1]), default=None)


def _ratio(group: GroupParity) -> float:
    if group.bound > 0:
        return group.max_abs_error / group.bound
    return 0.0 if group.max_abs_error == 0 else math.inf


def _variant_line(manifest: Manifest, variant: Variant) -> str:
    size = shown_bytes(_variant_bytes(manifest, variant))
    line = f"{variant.precision}: {size}, {sum(1 for _ in variant_graphs(variant))} graphs"
    worst = _worst_parity(variant)
    if worst is None:
        return line
    task, group = worst
    return (
        f"{line}; at export the error nearest to its bound was {group.max_abs_error:.2g} "
        f"of {group.bound:.2g} allowed ({task}, {group.group} rows)"
    )


def _variant_json(manifest: Manifest, variant: Variant) -> Json:
    worst = _worst_parity(variant)
    return {
        "precision": variant.precision,
        "size_bytes": _variant_bytes(manifest, variant),
        "graphs": [graph.path for graph in variant_graphs(variant)],
        "worst_parity": None
        if worst is None
        else {
            "task": worst[0],
            "group": worst[1].group,
            "max_abs_error": worst[1].max_abs_error,
            "torch_max_abs_error": worst[1].torch_max_abs_error,
            "bound": worst[1].bound,
        },
    }


def _producer_line(manifest: Manifest) -> str:
    made = manifest.producer
    return (
        f"te-export {made.te_export}, torch {made.torch}, onnx {made.onnx}, onnxscript {made.onnxscript}, "
        f"onnxruntime {made.onnxruntime}, opset {made.opset}"
    )


def _mismatch_line(mismatch: Comparison) -> str:
    return (
        f"mismatch: graph {mismatch.graph}, task {mismatch.task}, {mismatch.output}, row {mismatch.row}, "
        f"column {mismatch.column}, batch of {mismatch.batch}: expected {mismatch.expected:.9g}, "
        f"found {mismatch.found:.9g}, allowed error {mismatch.allowed:.3g}; "
        f"{mismatch.values_out_of_bound} values of this output are out of bound"
    )


def _comparison_json(comparison: Comparison) -> Json:
    """NaN and infinities become text, since JSON has no number for them."""
    values: dict[str, Json] = {}
    for field in dataclasses.fields(comparison):
        value = getattr(comparison, field.name)
        values[field.name] = str(value) if isinstance(value, float) and not math.isfinite(value) else value
    return values

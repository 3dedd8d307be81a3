"""What `te-runtime inspect` prints of a bundle: text for people, JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

from te_runtime.inputs import shown_shape
from te_runtime.interfaces import variant_graphs
from te_runtime.manifest import GroupParity, Manifest, TensorSpec, Variant

if TYPE_CHECKING:
    from te_runtime.bundle import Bundle

__all__ = ["Json", "bundle_json", "bundle_text", "shown_bytes"]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


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
        yield from _pruned_lines(manifest, variant)
    yield from _latency_lines(manifest)
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
        "latency": _latency_json(manifest),
        "golden_rows": {group.name: group.rows for group in manifest.golden.groups},
        "producer": manifest.producer._asdict(),
        "checkpoint_sha256": manifest.model.checkpoint_sha256,
        "manifest_sha256": bundle.manifest_sha256,
        "checksums_match": True if bundle.check == "full" else None,
        "files": {entry.path: entry.size_bytes for entry in manifest.files},
    }


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


def _pruned_lines(manifest: Manifest, variant: Variant) -> Iterator[str]:
    for task, graphs in zip(manifest.tasks, variant.tasks, strict=True):
        if graphs.pruned is None or task.routing_weights is None:
            continue
        experts, lost = ", ".join(map(str, graphs.pruned.experts)), graphs.pruned.accuracy
        yield (
            f"pruned     {task.name}: experts {experts} of {task.routing_weights.shape[-1]} are gone in mode pruned; "
            f"it loses {lost.loss_points:.2f} of {lost.budget_points:g} points allowed"
        )


def _latency_lines(manifest: Manifest) -> Iterator[str]:
    """The joint graph of each variant, where the export measured it; the reports and --json have every graph."""
    found = manifest.latency
    if found is None:
        return
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    for variant in manifest.variants:
        own = sorted((entry.batch, entry) for entry in found.graphs if entry.path == variant.joint.path)
        if own:
            is_measure = variant.precision == "fp32"
            shown = ", ".join(
                f"{batch:,} row{'' if batch == 1 else 's'} {entry.p50_us / 1e3:,.3g} ms"
                f"{'' if is_measure else f' ({entry.ratio:.2f}x)'}"
                for batch, entry in own
            )
            yield f"latency    {variant.precision}, all tasks{'' if is_measure else ' (over fp32)'}: {shown}"
    yield (
        f"           medians when it was exported, on {found.machine}, onnxruntime {found.onnxruntime}, "
        f"{found.provider}, {threads}; te-runtime bench measures here"
    )


def _latency_json(manifest: Manifest) -> Json:
    found = manifest.latency
    if found is None:
        return None
    return {**found._asdict(), "graphs": [entry._asdict() for entry in found.graphs]}


def _variant_json(manifest: Manifest, variant: Variant) -> Json:
    worst = _worst_parity(variant)
    return {
        "precision": variant.precision,
        "size_bytes": _variant_bytes(manifest, variant),
        "graphs": [graph.path for graph in variant_graphs(variant)],
        "pruned": {
            own.task: {"experts": list(own.pruned.experts), "loss_points": own.pruned.accuracy.loss_points}
            for own in variant.tasks
            if own.pruned is not None
        },
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

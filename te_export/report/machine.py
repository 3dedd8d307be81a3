"""What --json prints of an export."""

from __future__ import annotations

import dataclasses

from te_export.options import ExportResult
from te_runtime.strict_json import plain

__all__ = ["result_object"]


def result_object(result: ExportResult) -> dict[str, object]:
    """One JSON-ready object: where the bundle is, figures per task, and the whole manifest."""
    manifest = plain(result.manifest)
    status = "incomplete" if result.failed_variants else "ok" if result.published else "dry-run"
    return {
        "status": status,
        "exit_code": 1 if result.failed_variants else 0,
        "bundle": str(result.bundle),
        "published": result.published,
        "tasks": [
            {
                "name": task.name,
                "output_shape": list(task.prediction.shape),
                "max_abs_error": parity.prediction.max_abs_error,
                "torch_max_abs_error": parity.prediction.torch_max_abs_error,
                "ratio": parity.worst_ratio,
                "argmax_agreement": parity.prediction.argmax_agreement,
                "size_bytes": result.task_size_bytes[task.name],
            }
            for task, parity in zip(result.manifest.tasks, result.manifest.variants[0].parity, strict=True)
        ],
        "size_bytes": result.size_bytes,
        "rewrites": {
            "applied": [dataclasses.asdict(entry) for entry in result.rewrites.applied],
            "declined": [dataclasses.asdict(entry) for entry in result.rewrites.declined],
            "costs": [dataclasses.asdict(entry) for entry in result.rewrites.costs],
        },
        "variants": [dataclasses.asdict(summary) for summary in result.variants],
        "pruning": [dataclasses.asdict(found) for found in result.pruning],
        "failed_variants": [dataclasses.asdict(failed) for failed in result.failed_variants],
        "notes": list(result.notes),
        "step_seconds": dict(result.step_seconds),
        "manifest": manifest,
    }

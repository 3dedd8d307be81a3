"""What `te-export diff --json` prints; docs/diff.md says what each key means."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from te_export.compare_bundles.result import BundleDiff, LatencyDiff, TasksDiff, WeightChange

__all__ = ["diff_object"]


def diff_object(diff: BundleDiff, *, exit_code: int) -> dict[str, object]:
    """One JSON-ready object with everything that was found; `before` is A, `after` is B."""
    return {
        "status": "ok",
        "exit_code": exit_code,
        "different": diff.is_different,
        "a": dataclasses.asdict(diff.a),
        "b": dataclasses.asdict(diff.b),
        "model": _plain(diff.model),
        "inputs": _plain(diff.inputs),
        "tasks": _tasks(diff.tasks),
        "weights": [_weight(weight) for weight in diff.weights.weights] if diff.weights.is_compared else None,
        "variants": [
            {**dataclasses.asdict(variant), "different": variant.is_different} for variant in diff.variants
        ],
        "routing": _plain(diff.routing),
        "golden_is_same": diff.golden_is_same,
        "files": _plain(diff.files),
        "latency": _latency(diff.latency),
    }


def _plain(entries: Iterable[object]) -> list[object]:
    return [
        dataclasses.asdict(entry)
        for entry in entries
        if dataclasses.is_dataclass(entry) and not isinstance(entry, type)
    ]


def _tasks(tasks: TasksDiff) -> dict[str, object]:
    return {
        "pairs": _plain(tasks.pairs),
        "added": list(tasks.added),
        "removed": list(tasks.removed),
        "renamed": _plain(tasks.renamed),
        "reordered": tasks.is_reordered,
        "changes": _plain(tasks.changes),
    }


def _weight(weight: WeightChange) -> dict[str, object]:
    found = dataclasses.asdict(weight)
    if weight.values is not None:
        found["values"]["relative_rms"] = weight.values.relative_rms
    return found


def _latency(latency: LatencyDiff) -> dict[str, object]:
    return {
        "before": None if latency.before is None else dataclasses.asdict(latency.before),
        "after": None if latency.after is None else dataclasses.asdict(latency.after),
        "comparable": latency.is_comparable,
        "graphs": [
            {
                **dataclasses.asdict(graph),
                "ratio": latency.ratio(graph),
                "spreads_overlap": graph.spreads_overlap,
            }
            for graph in latency.graphs
        ],
    }

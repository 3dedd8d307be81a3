"""What `te-runtime verify` prints: text for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from te_runtime.golden import Comparison, VerifyReport
from te_runtime.provider_text import choice_lines, provider_json, shown_provider
from te_runtime.providers import ProviderChoice

if TYPE_CHECKING:
    from te_runtime.describe import Json

__all__ = ["verify_json", "verify_text"]

MAX_MISMATCHES_SHOWN = 10


def verify_text(name: str, report: VerifyReport, choice: ProviderChoice) -> Iterator[str]:
    """The lines of `te-runtime verify`."""
    yield (
        f"{name}, {report.precision} on {shown_provider(choice)}: "
        f"{report.rows} golden rows through {len(report.graph_files)} graphs"
    )
    yield from choice_lines(choice)
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


def verify_json(report: VerifyReport, choice: ProviderChoice) -> dict[str, Json]:
    """What `te-runtime verify --json` prints."""
    return {
        "ok": report.ok,
        "precision": report.precision,
        **provider_json(choice),
        "rows": report.rows,
        "graphs": list(report.graph_files),
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

"""What pruning found, in rows for a table and in sentences; the terminal and report.md show the same."""

from __future__ import annotations

from collections.abc import Iterator

from te_export.options import TaskPruning

__all__ = ["EXPERT_HEADINGS", "expert_rows", "found_line"]

EXPERT_HEADINGS = ("task", "expert", "mean weight", "largest weight", "")


def expert_rows(pruning: TaskPruning) -> Iterator[tuple[str, ...]]:
    """A row per expert: how the task uses it, and whether it stays."""
    for expert, (mean, largest) in enumerate(zip(pruning.use.mean, pruning.use.largest, strict=True)):
        state = "gone" if expert in pruning.removed else "kept"
        yield (pruning.task, str(expert), f"{mean:.4f}", f"{largest:.4f}", state)


def found_line(pruning: TaskPruning) -> str:
    """What went and what it cost, or why nothing did."""
    if pruning.loss_points is None:
        return f"{pruning.task}: {pruning.reason}"
    count = len(pruning.use.largest)
    experts = ", ".join(map(str, pruning.removed))
    return (
        f"{pruning.task}: without experts {experts} of {count} it loses {pruning.loss_points:.2f} of the "
        f"{pruning.budget_points:g} points allowed; {pruning.added_bytes:,} bytes of weights are its own"
    )

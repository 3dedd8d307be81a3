"""How far the graphs are from torch in float64, as report.html shows it: a row per task, then every group of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from te_export.report.html_table import Meter, Table, columns, make_table
from te_runtime.manifest import GroupParity, OutputParity, TaskParity, Variant

__all__ = ["VariantParity", "WorstGroup", "tasks_parity", "variant_parity", "worst_group"]

_OPEN_ROWS = 40
_NOTHING = "-"


@dataclass(frozen=True)
class WorstGroup:
    """The group of rows in which an output used most of what it was allowed."""

    task: str
    output: str
    group: str
    share: float


@dataclass(frozen=True)
class VariantParity:
    """One variant's parity.

    Attributes:
        exact: whether the bound is float32's; a variant of lower precision has a wider one.
        rows: what every graph was run over, such as `444 rows (273 ordinary, …)`.
    """

    precision: str
    exact: bool
    rows: str
    tasks: Table
    groups: Table


def variant_parity(variant: Variant) -> VariantParity:
    """The parity of one variant, per task and per group of rows."""
    checked = variant.parity[0].prediction.groups
    groups = ", ".join(f"{group.rows} {group.group}" for group in checked)
    name = variant.precision
    return VariantParity(
        precision=name,
        exact=not variant.accuracy,
        rows=f"{sum(group.rows for group in checked)} rows ({groups})",
        tasks=tasks_parity(f"{name}: the worst of each task", variant.parity),
        groups=make_table(
            f"{name}: every output and group of rows",
            columns(
                *("task", "output", "rows", "max abs error", "torch's own", "ratio", "allowed", "used"),
                numbers=("max abs error", "torch's own", "ratio", "allowed", "used"),
            ),
            (row for parity in variant.parity for row in _group_rows(parity)),
            open_rows=0 if variant.accuracy else _OPEN_ROWS,
        ),
    )


def tasks_parity(caption: str, parities: Sequence[TaskParity]) -> Table:
    """A row per task and output: errors, torch's own beside them, and how much of the bound was used at most."""
    errors = ("RMS error", "torch's RMS", "max relative error", "torch's relative")
    shown = (*errors, "worst ratio", "most of the bound used", "arg-max agreement")
    return make_table(
        caption,
        columns("task", "output", *shown, numbers=shown),
        (
            _output_row(parity.task, output, figures)
            for parity in parities
            for output, figures in parity.outputs.items()
        ),
        open_rows=_OPEN_ROWS,
    )


def worst_group(parities: Sequence[TaskParity]) -> WorstGroup | None:
    """Where most of the bound was used, of every task, output and group; None where nothing was bounded."""
    found = (
        WorstGroup(parity.task, output, group.group, share)
        for parity in parities
        for output, figures in parity.outputs.items()
        for group in figures.groups
        if (share := _used(group)) is not None
    )
    return max(found, key=lambda worst: worst.share, default=None)


def _output_row(task: str, output: str, figures: OutputParity) -> tuple[str | Meter, ...]:
    shares = [share for group in figures.groups if (share := _used(group)) is not None]
    return (
        task,
        output,
        f"{figures.rms_error:.2e}",
        f"{figures.torch_rms_error:.2e}",
        f"{figures.max_rel_error:.2e}",
        f"{figures.torch_max_rel_error:.2e}",
        _NOTHING if figures.ratio is None else _ratio(figures.ratio),
        Meter(max(shares)) if shares else _NOTHING,
        _NOTHING if figures.argmax_agreement is None else f"{figures.argmax_agreement:.2%}",
    )


def _group_rows(parity: TaskParity) -> Iterator[tuple[str | Meter, ...]]:
    for output, figures in parity.outputs.items():
        for group in figures.groups:
            own, used = group.torch_max_abs_error, _used(group)
            yield (
                parity.task,
                output,
                group.group,
                f"{group.max_abs_error:.2e}",
                f"{own:.2e}",
                _ratio(group.max_abs_error / own) if own else _NOTHING,
                f"{group.bound:.2e}",
                _NOTHING if used is None else Meter(used),
            )


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 1000 else f"{ratio:.1e}"


def _used(group: GroupParity) -> float | None:
    return group.max_abs_error / group.bound if group.bound else None

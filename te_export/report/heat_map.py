"""The routing heat map: tasks by experts, from the manifest's utilization."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from te_export.report.heat_colours import heat_step
from te_runtime.manifest import TaskUtilization

__all__ = ["HeatBand", "HeatCell", "HeatRow", "heat_bands"]

_BAND = 16


@dataclass(frozen=True)
class HeatCell:
    """One task's use of one expert; `step` counts the steps of heat_colours."""

    step: int
    mean: str
    low: str
    high: str
    wins: int


@dataclass(frozen=True)
class HeatRow:
    """One task; None where its gate has no such expert."""

    task: str
    cells: tuple[HeatCell | None, ...]


@dataclass(frozen=True)
class HeatBand:
    """At most 16 experts beside one another, so that a band fits on paper and most screens."""

    first: int
    last: int
    rows: tuple[HeatRow, ...]

    @property
    def experts(self) -> range:
        return range(self.first, self.last + 1)


def heat_bands(utilization: Sequence[TaskUtilization]) -> tuple[HeatBand, ...]:
    """The whole map, cut into bands of experts. A task without any expert in a band has no row there."""
    count = max((len(entry.mean) for entry in utilization), default=0)
    return tuple(_band(utilization, first, min(first + _BAND, count)) for first in range(0, count, _BAND))


def _band(utilization: Sequence[TaskUtilization], first: int, stop: int) -> HeatBand:
    rows = tuple(
        HeatRow(entry.task, tuple(_cells(entry, first, stop)))
        for entry in utilization
        if len(entry.mean) > first
    )
    return HeatBand(first, stop - 1, rows)


def _cells(entry: TaskUtilization, first: int, stop: int) -> Iterator[HeatCell | None]:
    count = len(entry.mean)
    for expert in range(first, stop):
        if expert >= count:
            yield None
            continue
        mean = entry.mean[expert]
        yield HeatCell(
            step=heat_step(mean, count),
            mean=f"{mean:.3f}",
            low=f"{entry.low[expert]:.3f}",
            high=f"{entry.high[expert]:.3f}",
            wins=entry.wins[expert],
        )

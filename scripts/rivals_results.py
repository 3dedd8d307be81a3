"""What a run of the rivals gave: samples, errors, who was left out and why; ratios are taken here.

A ratio is taken within a round, of the round's medians, so that whatever slows the machine for a while slows both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rivals_parity import Precision
from rivals_plan import Family, ModelChoice, Point, Scope
from rivals_subjects import Role

STEADY = 0.05
"""How much the first and the second half of the rounds may differ in a ratio that is called steady."""


@dataclass(frozen=True)
class Ratio:
    """A latency over another's: the median over rounds, the 10th and the 90th percentile, and whether halves agree."""

    median: float
    low: float
    high: float
    is_steady: bool


@dataclass(frozen=True)
class Measured:
    """A subject at a point.

    Attributes:
        error: of its answers, as rivals_parity.py says; None for the roof, which has none.
        rounds_us: latencies, a list for each round.
    """

    point: Point
    subject: str
    scope: Scope
    role: Role
    precision: Precision
    error: float | None
    rounds_us: list[list[float]]

    @property
    def median_us(self) -> float:
        return float(np.median(np.concatenate(self.rounds_us)))

    def by_round(self) -> NDArray[np.float64]:
        """(rounds,) in µs."""
        return np.array([np.median(samples) for samples in self.rounds_us])


@dataclass(frozen=True)
class Absence:
    """A subject that was not measured somewhere.

    Attributes:
        where: a model, or a model and threads, or a point.
    """

    subject: str
    where: str
    reason: str


@dataclass
class Results:
    """Everything, as it comes in.

    Attributes:
        settings: what it was made with: versions, machine, plan.
        models: a note for each model, by its label.
    """

    settings: dict[str, str]
    models: dict[str, str] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    absences: list[Absence] = field(default_factory=list)

    def points(self) -> list[Point]:
        """In the order they were measured."""
        return list(dict.fromkeys(entry.point for entry in self.measured))

    def at(self, point: Point, scope: Scope) -> list[Measured]:
        """The subjects of a scope at a point."""
        return [entry for entry in self.measured if (entry.point, entry.scope) == (point, scope)]

    def naive(self, point: Point, scope: Scope) -> Measured | None:
        return _first(self.at(point, scope), Role.NAIVE)

    def roof(self, point: Point, scope: Scope) -> Measured | None:
        return _first(self.at(point, scope), Role.ROOF)


def take_ratio(above: Measured, below: Measured) -> Ratio:
    """The latency of one subject over another's at the same point.

    Raises:
        ValueError: they were not measured in the same rounds.
    """
    if above.point != below.point or len(above.rounds_us) != len(below.rounds_us):
        raise ValueError(
            f"{above.subject} at {above.point.label} and {below.subject} at {below.point.label} were not measured "
            "in the same rounds"
        )
    ratios = above.by_round() / below.by_round()
    low, median, high = (float(value) for value in np.percentile(ratios, (10, 50, 90)))
    first, second = np.median(ratios[: (len(ratios) + 1) // 2]), np.median(ratios[len(ratios) // 2 :])
    return Ratio(median, low, high, is_steady=bool(abs(first - second) <= STEADY * median))


def write_json(path: Path, results: Results) -> None:
    """Everything, every sample to the tenth of a µs."""
    kept = asdict(results)
    for entry in kept["measured"]:
        entry["rounds_us"] = [[round(sample, 1) for sample in samples] for samples in entry["rounds_us"]]
    path.write_text(json.dumps(kept) + "\n", encoding="utf-8")


def read_json(path: Path) -> Results:
    """What write_json wrote."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    return Results(
        settings=kept["settings"],
        models=kept["models"],
        measured=list(_read_measured(kept["measured"])),
        absences=[Absence(**entry) for entry in kept["absences"]],
    )


def _read_measured(kept: Sequence[dict[str, Any]]) -> Iterable[Measured]:
    for entry in kept:
        point = entry["point"]
        model = ModelChoice(**{**point["model"], "family": Family(point["model"]["family"])})
        yield Measured(
            **{
                **entry,
                "point": Point(**{**point, "model": model}),
                "scope": Scope(entry["scope"]),
                "role": Role(entry["role"]),
            }
        )


def _first(entries: Iterable[Measured], role: Role) -> Measured | None:
    return next((entry for entry in entries if entry.role is role), None)

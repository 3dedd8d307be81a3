"""Where te-export loses, told from the figures: a rival that is at least as precise and takes less time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rivals_parity import Precision
from rivals_plan import Point, Scope
from rivals_results import Measured, Ratio, Results, take_ratio
from rivals_subjects import Role

_BITS: dict[Precision, int] = {"float32": 32, "bfloat16": 16, "int8": 8}


@dataclass(frozen=True)
class Loss:
    """A rival that beats a way of te-export's somewhere.

    Attributes:
        measured: points at which both were measured.
        points: those at which the rival's median is lower, each with the rival's latency over ours.
    """

    ours: str
    rival: str
    scope: Scope
    measured: int
    points: tuple[tuple[Point, Ratio], ...]

    @property
    def clear(self) -> int:
        """Points at which the rival was faster in nine rounds of ten."""
        return sum(ratio.high < 1 for _, ratio in self.points)

    @property
    def worst(self) -> tuple[Point, Ratio]:
        return min(self.points, key=lambda pair: pair[1].median)


def find_losses(results: Results) -> list[Loss]:
    """For every way of te-export's each rival that beats it, naive among them: the clearest first, then the largest."""
    pairs: dict[tuple[str, str, Scope], list[tuple[Point, Ratio]]] = {}
    for point in results.points():
        for scope in Scope:
            entries = results.at(point, scope)
            for ours, rival in _comparable(entries):
                key = (ours.subject, rival.subject, scope)
                pairs.setdefault(key, []).append((point, take_ratio(rival, ours)))
    losses = [
        Loss(ours, rival, scope, len(ratios), lost)
        for (ours, rival, scope), ratios in pairs.items()
        if (lost := tuple(pair for pair in ratios if pair[1].median < 1))
    ]
    return sorted(losses, key=lambda loss: (-loss.clear, loss.worst[1].median))


def _comparable(entries: list[Measured]) -> Iterable[tuple[Measured, Measured]]:
    """Ours, and a rival whose numbers are no coarser."""
    for ours in entries:
        for rival in entries:
            is_pair = ours.role is Role.OURS and rival.role in (Role.RIVAL, Role.NAIVE)
            if is_pair and _BITS[rival.precision] >= _BITS[ours.precision]:
                yield ours, rival

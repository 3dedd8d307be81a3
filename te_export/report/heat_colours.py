"""Colours of the routing heat map: seven steps of how a routing weight compares with an equal share 1/K.

Steps and not a continuous scale, so that 200 tasks by 64 experts need seven rules of style and no colour per cell, and
so that every text colour can be proved against its ground. Cells hold their numbers: no colour says anything alone.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HEAT_STEPS", "HeatStep", "heat_step"]


@dataclass(frozen=True)
class HeatStep:
    """One step.

    Attributes:
        least_shares: the smallest mean weight of the step, in equal shares.
        meaning: of a mean weight on this step, for the legend.
        light, dark: ground and text in either scheme, `#rrggbb`.
    """

    least_shares: float
    meaning: str
    light: tuple[str, str]
    dark: tuple[str, str]


HEAT_STEPS = (
    HeatStep(0.0, "under ⅛ of an equal share", ("#f4f7fa", "#1b2530"), ("#18212b", "#e6edf3")),
    HeatStep(0.125, "⅛ to ½", ("#dfeaf5", "#1b2530"), ("#1b3045", "#e6edf3")),
    HeatStep(0.5, "½ to ⅘", ("#c3daef", "#12202e"), ("#1d4263", "#f0f6fc")),
    HeatStep(0.8, "about equal, ⅘ to 1¼", ("#9ec7e8", "#0b1a28"), ("#235784", "#ffffff")),
    HeatStep(1.25, "1¼ to 2", ("#6eaadb", "#06121d"), ("#4f94cd", "#06121d")),
    HeatStep(2.0, "2 to 4", ("#1f669e", "#ffffff"), ("#86bfea", "#06121d")),
    HeatStep(4.0, "4 equal shares and more", ("#0b3a61", "#ffffff"), ("#d3e8f9", "#06121d")),
)


def heat_step(mean: float, experts: int) -> int:
    """The step of a mean routing weight among `experts` experts, counted from 0."""
    shares = mean * experts
    return max((place for place, step in enumerate(HEAT_STEPS) if shares >= step.least_shares), default=0)

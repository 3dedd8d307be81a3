"""Which experts a task can do without: tried one after another, judged by what the task loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["choose_experts"]


def choose_experts(
    candidates: Sequence[int], *, count: int, loss: Callable[[tuple[int, ...]], float], budget: float
) -> tuple[int, ...]:
    """The experts to take out, in the order they were found.

    Each candidate is tried once, together with those that were found before it. One that costs too much stays, and
    the rest are tried all the same: an expert of little routing weight may still be what the gate looks at, and
    the next one not.

    Args:
        candidates: experts, the one most likely to be spared first.
        count: how many experts there are; one stays in any case.
        loss: what the task loses without these experts.
        budget: the most it may lose.
    """
    removed: tuple[int, ...] = ()
    for expert in candidates:
        tried = (*removed, expert)
        if len(tried) < count and loss(tried) <= budget:
            removed = tried
    return removed

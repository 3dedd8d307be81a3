"""Which experts a task can do without: tried one after another, judged by what the task loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from te_export.capture.joint_graph import EXPERT_FEATURES
from te_export.models.input_rows import InputRows
from te_export.pruning.prune_experts import Means, with_means
from te_runtime.session_types import Session

__all__ = ["answer_with_means", "choose_experts"]


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


def answer_with_means(
    trunk: Session, tail: Session, means: Means
) -> Callable[[InputRows], Sequence[NDArray[np.generic]]]:
    """What a task answers to rows while some experts answer their means: prediction and weights.

    Args:
        trunk, tail: the graphs of the task as they are.
        means: the mean outputs of those experts.
    """
    names = [spec.name for spec in trunk.spec.inputs]

    def answer(x: InputRows) -> Sequence[NDArray[np.generic]]:
        (features,) = trunk.run(x.feeds(names))
        return tail.run({EXPERT_FEATURES: with_means(features, means)})

    return answer

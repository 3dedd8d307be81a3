"""Reading a model's sizes off the shapes of its tensors: every tensor votes, so that one damaged tensor is
found out by the others.

A family writes each shape once, as multiples of named sizes, under the parameter's name with its first index
replaced by `#`; a `#` in a size's name stands for that index:

    {"branches.#.0.weight": (("branch_dim", 1), ("shared_dim", 1)), "heads.#.bias": (("out of task #", 1),)}
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping

from torch import Tensor

from te_export.errors import CheckpointError

__all__ = ["Axes", "count_below", "read_sizes", "size_of", "without_index"]

Axes = tuple[tuple[str, int] | None, ...]
"""Per axis the size and the multiple of it; None where the length tells no size."""

_INDEX = re.compile(r"\.(\d{1,4})(?=\.)")


def without_index(name: str) -> str:
    """The name with its first index replaced: `branches.3.0.weight` → `branches.#.0.weight`."""
    return _INDEX.sub(".#", name, count=1)


def read_sizes(state: Mapping[str, Tensor], axes: Mapping[str, Axes]) -> dict[str, int]:
    """The value of every size that some tensor tells: the one most axes agree on."""
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for name, tensor in state.items():
        expected = axes.get(without_index(name), ())
        if tensor.ndim != len(expected):
            continue
        index = _INDEX.search(name)
        for axis, length in zip(expected, tensor.shape, strict=True):
            if axis is not None and length and length % axis[1] == 0:
                votes[axis[0].replace("#", index[1] if index else "#")][length // axis[1]] += 1
    return {size: counter.most_common(1)[0][0] for size, counter in votes.items()}


def size_of(sizes: Mapping[str, int], size: str, *, told_by: str) -> int:
    """One of the sizes read.

    Args:
        told_by: the tensors that would tell it, for the message.

    Raises:
        CheckpointError: no tensor tells it.
    """
    if size not in sizes:
        raise CheckpointError(
            f"nothing tells {size}: expected tensors named {told_by}, with the shapes of that layer; found none. "
            "Save the whole model.state_dict() under its own parameter names."
        )
    return sizes[size]


def count_below(state: Mapping[str, Tensor], part: str) -> int:
    """How many indices there are below a part (`heads.0.…`, `heads.1.…`); a stray index far beyond the others
    does not count as one more of each before it.
    """
    pattern = re.compile(rf"{re.escape(part)}\.(\d{{1,4}})\.")
    indices = {int(found[1]) for name in state if (found := pattern.match(name))}
    highest = max(indices, default=-1) + 1
    return highest if highest <= 2 * len(indices) else len(indices)

"""Reading a TaskExpert config off the shapes in a state dict, and comparing state dict, shapes and config.

Every parameter's shape is written once, as multiples of the config's sizes. Read forwards it gives the
expected shape; read backwards every tensor votes for the sizes it depends on, so that one damaged tensor is
found out by the others.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from te_export.errors import CheckpointError
from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel

__all__ = [
    "Sizes",
    "check_shapes",
    "expected_shapes",
    "is_convolutional",
    "looks_like_task_expert",
    "read_sizes",
    "stored_in_out",
]

_INDEXED = re.compile(r"(experts|gating_networks|task_heads)\.(\d{1,6})\.")
_UNUSED_PREFIX = "feature_fusion."
_CONVOLUTIONS_PREFIX = "backbone.convolutions."
_SHOWN_PROBLEMS = 200

# Parameter name with indices removed → axes, each (size it is a multiple of, the multiple). None: not to be
# inverted.
_Axes = dict[str, tuple[tuple[str, int] | None, ...]]
_LINEAR_BACKBONE: _Axes = {
    "backbone.network.0.weight": (("backbone_dim", 2), ("input_dim", 1)),
    "backbone.network.0.bias": (("backbone_dim", 2),),
    "backbone.network.3.weight": (("backbone_dim", 1), ("backbone_dim", 2)),
    "backbone.network.3.bias": (("backbone_dim", 1),),
    "backbone.network.6.weight": (("backbone_dim", 1), ("backbone_dim", 1)),
    "backbone.network.6.bias": (("backbone_dim", 1),),
}
_CONVOLUTIONAL_BACKBONE: _Axes = {
    "backbone.projection.weight": (("backbone_dim", 1), None),
    "backbone.projection.bias": (("backbone_dim", 1),),
}
_EXPERTS_AND_TASKS: _Axes = {
    "experts.network.0.weight": (("expert_dim", 2), ("backbone_dim", 1)),
    "experts.network.0.bias": (("expert_dim", 2),),
    "experts.network.3.weight": (("expert_dim", 1), ("expert_dim", 2)),
    "experts.network.3.bias": (("expert_dim", 1),),
    "experts.network.6.weight": (("expert_dim", 1), ("expert_dim", 1)),
    "experts.network.6.bias": (("expert_dim", 1),),
    "gating_networks.gate.0.weight": (("expert_dim", 1), None),
    "gating_networks.gate.0.bias": (("expert_dim", 1),),
    "gating_networks.gate.2.weight": (("num_experts", 1), ("expert_dim", 1)),
    "gating_networks.gate.2.bias": (("num_experts", 1),),
    "task_heads.head.0.weight": (None, ("expert_dim", 1)),
    "task_heads.head.0.bias": (None,),
    "task_heads.head.3.weight": (("out", 1), None),
    "task_heads.head.3.bias": (("out", 1),),
}


@dataclass(frozen=True)
class Sizes:
    """The part of a TaskExpertConfig that shapes determine."""

    input_dim: int
    backbone_dim: int
    expert_dim: int
    num_experts: int
    num_tasks: int
    task_output_dims: tuple[int, ...]


def looks_like_task_expert(names: Mapping[str, Tensor]) -> bool:
    """Whether the names contain a backbone, experts, gates and heads as TaskExpert names them."""
    axes = _axes_of(names)
    present = {_without_index(name).split(".")[0] for name in names if _without_index(name) in axes}
    if is_convolutional(names):
        present.add("backbone")
    return present == {"backbone", "experts", "gating_networks", "task_heads"}


def stored_in_out(state: Mapping[str, Tensor]) -> bool:
    """Whether weights are stored (in, out) rather than torch's (out, in): told by the biases of the layers
    that are not square.
    """
    votes: Counter[bool] = Counter()
    for name, tensor in state.items():
        bias = state.get(name.removesuffix("weight") + "bias") if name.endswith(".weight") else None
        if bias is None or tensor.ndim != 2 or bias.ndim != 1 or tensor.shape[0] == tensor.shape[1]:
            continue
        if bias.shape[0] in tensor.shape:
            votes[tensor.shape[1] == bias.shape[0]] += 1
    return votes[True] > votes[False]


def is_convolutional(names: Mapping[str, Tensor]) -> bool:
    """Whether the backbone is a convolutional one, by the names of its parameters."""
    has_linear = any(name.startswith("backbone.network.") for name in names)
    return not has_linear and any(name.startswith(_CONVOLUTIONS_PREFIX) for name in names)


def read_sizes(state: Mapping[str, Tensor], *, input_dim: int | None = None) -> Sizes:
    """The sizes that most tensors agree on.

    Args:
        input_dim: where it is known already, as it is of images.

    Raises:
        CheckpointError: no tensor is left that tells some size; missing and unexpected names are listed.
    """
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    axes = _axes_of(state)
    for name, tensor in state.items():
        _vote(votes, axes, name, tensor)
    if input_dim is not None:
        votes["input_dim"][input_dim] += 1
    votes["num_experts"][_count(state, "experts")] += 1  # beside two votes of every gate
    experts = votes["num_experts"].most_common(1)[0][0]
    tasks = max(_count(state, "gating_networks"), _count(state, "task_heads"))
    needed = ["input_dim", "backbone_dim", "expert_dim", *(f"out of task {task}" for task in range(tasks))]
    untold = [size for size in needed if not votes.get(size)]
    if untold:
        raise _names_error(state, experts=experts, tasks=tasks, untold=untold)
    winners = {size: votes[size].most_common(1)[0][0] for size in needed}
    return Sizes(
        input_dim=winners["input_dim"],
        backbone_dim=winners["backbone_dim"],
        expert_dim=winners["expert_dim"],
        num_experts=experts,
        num_tasks=tasks,
        task_output_dims=tuple(winners[f"out of task {task}"] for task in range(tasks)),
    )


def expected_shapes(config: TaskExpertConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a model with this config, in state dict order."""
    with torch.device("meta"):
        model = TaskExpertModel(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_shapes(state: Mapping[str, Tensor], config: TaskExpertConfig, source: str) -> None:
    """Compare a state dict with a config. feature_fusion may be absent as a whole, since no prediction uses
    it.

    Args:
        source: what the expected shapes follow from, for the message.

    Raises:
        CheckpointError: listing every missing, extra and misshaped tensor, with the nearest name.
    """
    expected = expected_shapes(config)
    if not any(name.startswith(_UNUSED_PREFIX) for name in state):
        expected = {name: shape for name, shape in expected.items() if not name.startswith(_UNUSED_PREFIX)}
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    problems = [f"missing    {name} {list(expected[name])}" for name in missing]
    problems += [f"unexpected {name} {list(state[name].shape)}" for name in extra]
    problems = _with_nearest(problems, missing, extra)
    problems += [
        f"misshaped  {name}: expected {list(shape)}, found {list(state[name].shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise _problems_error(problems, f"a TaskExpert model with {source}")


def _names_error(
    state: Mapping[str, Tensor], *, experts: int, tasks: int, untold: Sequence[str]
) -> CheckpointError:
    """What is missing where the shapes that are left do not tell every size: names only."""
    counts = {"experts": experts, "gating_networks": tasks, "task_heads": tasks}
    expected = []
    axes = _axes_of(state)
    for name in axes:
        part, _, rest = name.partition(".")
        expected += [f"{part}.{index}.{rest}" for index in range(counts[part])] if part in counts else [name]
    missing = [name for name in expected if name not in state]
    told_apart = (_UNUSED_PREFIX, _CONVOLUTIONS_PREFIX)
    extra = [name for name in state if name not in expected and not name.startswith(told_apart)]
    odd = [name for name in expected if name in state and state[name].ndim != len(axes[_without_index(name)])]
    problems = [f"missing    {name}" for name in missing]
    problems += [f"unexpected {name} {list(state[name].shape)}" for name in extra]
    problems = _with_nearest(problems, missing, extra)
    problems += [f"misshaped  {name}: found {list(state[name].shape)}" for name in odd]
    return _problems_error(problems, f"a TaskExpert model (nothing tells its {', '.join(untold[:5])})")


def _problems_error(problems: list[str], what: str) -> CheckpointError:
    count = len(problems)
    if count > _SHOWN_PROBLEMS:
        problems = [*problems[:_SHOWN_PROBLEMS], f"… and {count - _SHOWN_PROBLEMS} more"]
    return CheckpointError(
        f"{count} {'tensor does' if count == 1 else 'tensors do'} not fit {what}:\n  "
        + "\n  ".join(problems)
        + "\n"
        "Save the whole model.state_dict() of one TaskExpert model, under its own parameter names."
    )


def _with_nearest(problems: list[str], missing: list[str], extra: list[str]) -> list[str]:
    """The same lines, each missing name with the nearest unexpected one and the other way round."""
    others = [(name, extra) for name in missing] + [(name, missing) for name in extra]
    return [line + _nearest(name, names) for line, (name, names) in zip(problems, others, strict=True)]


def _axes_of(names: Mapping[str, Tensor]) -> _Axes:
    backbone = _CONVOLUTIONAL_BACKBONE if is_convolutional(names) else _LINEAR_BACKBONE
    return backbone | _EXPERTS_AND_TASKS


def _without_index(name: str) -> str:
    return _INDEXED.sub(r"\1.", name, count=1)


def _count(state: Mapping[str, Tensor], part: str) -> int:
    """How many experts, gates or heads there are; a stray index far beyond the others does not count as one
    more
    of each before it."""
    indices = {int(found[2]) for name in state if (found := _INDEXED.match(name)) and found[1] == part}
    highest = max(indices, default=-1) + 1
    return highest if highest <= 2 * len(indices) else len(indices)


def _vote(votes: dict[str, Counter[int]], table: _Axes, name: str, tensor: Tensor) -> None:
    axes = table.get(_without_index(name))
    if axes is None or tensor.ndim != len(axes):
        return
    for axis, length in zip(axes, tensor.shape, strict=True):
        if axis is None or length % axis[1]:
            continue
        found = _INDEXED.match(name)
        size = f"out of task {int(found[2])}" if axis[0] == "out" and found else axis[0]
        votes[size][length // axis[1]] += 1


def _nearest(name: str, candidates: list[str]) -> str:
    """The most similar candidate, sought first among those of the same layer family and index."""
    place = _INDEXED.match(name)
    beside = [other for other in candidates if place is not None and other.startswith(place[0])]
    if not beside and len(candidates) > _SHOWN_PROBLEMS:
        return ""
    near = difflib.get_close_matches(name, beside or candidates, n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""

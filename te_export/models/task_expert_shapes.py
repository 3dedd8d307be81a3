"""Reading a TaskExpert config off the shapes in a state dict, and comparing state dict, shapes and config.

Every parameter's shape is written once, as multiples of the config's sizes. Read forwards it gives the
expected shape; read backwards every tensor votes for the sizes it depends on, so that one damaged tensor is
found out by the others.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from te_export.errors import CheckpointError
from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel

__all__ = [
    "Sizes",
    "check_shapes",
    "expected_shapes",
    "looks_like_task_expert",
    "read_sizes",
    "stored_in_out",
]

_INDEXED = re.compile(r"(experts|gating_networks|task_heads)\.(\d{1,6})\.")
_UNUSED_PREFIX = "feature_fusion."

# Parameter name with indices removed → axes, each (size it is a multiple of, the multiple). None: not to be
# inverted.
_AXES: dict[str, tuple[tuple[str, int] | None, ...]] = {
    "backbone.network.0.weight": (("backbone_dim", 2), ("input_dim", 1)),
    "backbone.network.0.bias": (("backbone_dim", 2),),
    "backbone.network.3.weight": (("backbone_dim", 1), ("backbone_dim", 2)),
    "backbone.network.3.bias": (("backbone_dim", 1),),
    "backbone.network.6.weight": (("backbone_dim", 1), ("backbone_dim", 1)),
    "backbone.network.6.bias": (("backbone_dim", 1),),
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
    present = {_without_index(name).split(".")[0] for name in names if _without_index(name) in _AXES}
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


def read_sizes(state: Mapping[str, Tensor]) -> Sizes:
    """The sizes that most tensors agree on.

    Raises:
        CheckpointError: no tensor is left that tells some size.
    """
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for name, tensor in state.items():
        _vote(votes, name, tensor)
    counts = {part: _count(state, part) for part in ("experts", "gating_networks", "task_heads")}
    num_tasks = max(counts["gating_networks"], counts["task_heads"])
    votes["num_experts"][counts["experts"]] += 1
    return Sizes(
        input_dim=_winner(votes, "input_dim"),
        backbone_dim=_winner(votes, "backbone_dim"),
        expert_dim=_winner(votes, "expert_dim"),
        num_experts=counts["experts"],
        num_tasks=num_tasks,
        task_output_dims=tuple(_winner(votes, f"out of task {task}") for task in range(num_tasks)),
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
    problems = [f"missing    {name} {list(expected[name])}{_nearest(name, extra)}" for name in missing]
    problems += [f"unexpected {name} {list(state[name].shape)}{_nearest(name, missing)}" for name in extra]
    problems += [
        f"misshaped  {name}: expected {list(shape)}, found {list(state[name].shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise CheckpointError(
            f"{len(problems)} tensors do not fit a TaskExpert model with {source}:\n  "
            + "\n  ".join(problems)
            + "\nSave the whole model.state_dict() of one TaskExpert model, under its own parameter names."
        )


def _without_index(name: str) -> str:
    return _INDEXED.sub(r"\1.", name, count=1)


def _count(state: Mapping[str, Tensor], part: str) -> int:
    indices = [int(found[2]) for name in state if (found := _INDEXED.match(name)) and found[1] == part]
    return max(indices, default=-1) + 1


def _vote(votes: dict[str, Counter[int]], name: str, tensor: Tensor) -> None:
    axes = _AXES.get(_without_index(name))
    if axes is None or tensor.ndim != len(axes):
        return
    for axis, length in zip(axes, tensor.shape, strict=True):
        if axis is None or length % axis[1]:
            continue
        found = _INDEXED.match(name)
        size = f"out of task {int(found[2])}" if axis[0] == "out" and found else axis[0]
        votes[size][length // axis[1]] += 1


def _winner(votes: Mapping[str, Counter[int]], size: str) -> int:
    counted = votes.get(size)
    if not counted:
        raise CheckpointError(
            f"no tensor tells {size}: the layers that depend on it are all missing or misshaped. "
            "Save the whole model.state_dict() of one TaskExpert model."
        )
    return counted.most_common(1)[0][0]


def _nearest(name: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""

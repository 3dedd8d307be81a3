"""From a checkpoint to a task-branch model: told by its parameter names, every size read off the shapes.

A config in the file must agree with the shapes; it adds nothing that a prediction depends on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from te_export.checkpoint.contents import Checkpoint
from te_export.errors import CheckpointError, UsageError
from te_export.models.config_values import training_settings
from te_export.models.loaded_module import LoadedModule
from te_export.models.size_votes import Axes, count_below, read_sizes, size_of
from te_export.models.state_fit import (
    fill,
    has_parts,
    require_agreement,
    require_finite,
    require_fit,
    require_floats,
    require_layers,
)
from te_export.models.task_branch import AGGREGATE, TaskBranchConfig, TaskBranchModel
from te_export.models.task_names import name_tasks

__all__ = ["is_task_branch", "load_task_branch"]

_OWN = re.compile(r"shared\.(weight|bias)$|branches\.\d+\.[02]\.(weight|bias)$|task_weights\.logits$")
_OTHER_FAMILIES = {"backbone", "experts", "gating_networks", "task_heads", "components", "routing", "heads"}
_EXAMPLE_ROWS = 64
_TOLD_BY_TENSORS = ("input_dim", "shared_dim", "branch_dim", "output_dim")

_AXES: dict[str, Axes] = {
    "standardize.mean": (("input_dim", 1),),
    "standardize.scale": (("input_dim", 1),),
    "shared.weight": (("shared_dim", 1), ("input_dim", 1)),
    "shared.bias": (("shared_dim", 1),),
    "branches.#.0.weight": (("branch_dim", 1), ("shared_dim", 1)),
    "branches.#.0.bias": (("branch_dim", 1),),
    "branches.#.2.weight": (("output_dim", 1), ("branch_dim", 1)),
    "branches.#.2.bias": (("output_dim", 1),),
}


def is_task_branch(state: Mapping[str, Tensor]) -> bool:
    """Whether the names have a shared layer, branches and task weights as this family names them, and no part of
    another.
    """
    return has_parts(state, _OWN, {"shared", "branches", "task_weights"}, others=_OTHER_FAMILIES)


def load_task_branch(checkpoint: Checkpoint, *, task_names: Sequence[str] | None = None) -> LoadedModule:
    """Build the model of a checkpoint. Its outputs are the tasks, then `aggregate`.

    Args:
        task_names: a name for each branch, or None for those in the file.

    Raises:
        CheckpointError: not of this family; tensors missing, unexpected, misshaped, of another dtype, NaN or
            infinite; a scale that is not positive; config and tensors disagree.
        UsageError: a task name is not allowed, or there are too few or too many.
    """
    try:
        return _load(checkpoint, task_names)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _load(checkpoint: Checkpoint, task_names: Sequence[str] | None) -> LoadedModule:
    state = checkpoint.state
    if not is_task_branch(state):
        raise CheckpointError(
            "not a task-branch checkpoint: expected tensors named standardize.*, shared.*, branches.N.* and "
            f"task_weights.logits; found {', '.join(list(state)[:8])}. Save model.state_dict() under its own "
            "parameter names."
        )
    notes = require_floats(state)
    names = _names(checkpoint, task_names)
    config = _settle_config(checkpoint, names)
    with torch.device("meta"):
        model = TaskBranchModel(config)
    require_fit(state, model, what="a task-branch model with the sizes most tensors agree on")
    require_layers(checkpoint.layer_types, model)
    require_finite(state)
    fill(model, state)
    _require_positive_scale(model)
    return LoadedModule(
        family="TaskBranch",
        config={**dataclasses.asdict(config), "task_names": ",".join(names)},
        module=model,
        input_name="x",
        example_inputs=_example_inputs(model),
        task_names=model.output_names,
        unused_parameters=(),
        notes=(*checkpoint.notes, *notes),
    )


def _names(checkpoint: Checkpoint, asked: Sequence[str] | None) -> tuple[str, ...]:
    """A name per branch; a missing last branch still has its task weight."""
    count = count_below(checkpoint.state, "branches")
    weights = checkpoint.state["task_weights.logits"]
    if weights.ndim == 1 and weights.numel() <= 2 * count:
        count = max(count, weights.numel())
    names = name_tasks(count, asked=asked, in_file=checkpoint.task_names)
    if any(name.lower() == AGGREGATE for name in names):
        raise UsageError(
            f"a task is named {AGGREGATE!r}, the name of the output that is the weighted sum of all branches. Give "
            "other names with --task-names a,b,c"
        )
    return names


def _settle_config(checkpoint: Checkpoint, names: tuple[str, ...]) -> TaskBranchConfig:
    found = dict(checkpoint.config or {})
    sizes = read_sizes(checkpoint.state, _AXES)
    config = TaskBranchConfig(
        input_dim=size_of(sizes, "input_dim", told_by="standardize.* and shared.weight"),
        shared_dim=size_of(sizes, "shared_dim", told_by="shared.*"),
        branch_dim=size_of(sizes, "branch_dim", told_by="branches.N.0.*"),
        output_dim=size_of(sizes, "output_dim", told_by="branches.N.2.*"),
        task_names=names,
        **training_settings(found, ("learning_rate", "weight_decay")),
    )
    read = {name: getattr(config, name) for name in _TOLD_BY_TENSORS}
    require_agreement(found, read, checkpoint.config_source)
    return config


def _require_positive_scale(model: TaskBranchModel) -> None:
    wrong = (model.standardize.scale <= 0).nonzero().flatten().tolist()
    if wrong:
        raise CheckpointError(
            f"standardize.scale is not positive for {len(wrong)} of {model.config.input_dim} inputs (the first: "
            f"{', '.join(map(str, wrong[:5]))}), expected standard deviations. Take mean and scale from training "
            "rows again, with 1 for a constant input."
        )


def _example_inputs(model: TaskBranchModel) -> Tensor:
    """Rows whose standardized values are normal, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn((_EXAMPLE_ROWS, model.config.input_dim), generator=generator)
    return model.standardize.mean + z * model.standardize.scale

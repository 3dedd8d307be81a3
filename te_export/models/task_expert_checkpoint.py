"""From a checkpoint to a TaskExpert model that can be exported: which config it has, and whether its tensors
are sound.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from te_export.checkpoint.contents import Checkpoint, ConfigValue
from te_export.checkpoint.shown import shown
from te_export.errors import CheckpointError
from te_export.models.exportable import ExpertFeatures, ExportableModel, ModelInput, TaskOutput
from te_export.models.state_fit import require_finite, require_floats
from te_export.models.task_expert import (
    ConvolutionalTaskExpertConfig,
    TaskExpertConfig,
    TaskExpertModel,
)
from te_export.models.task_expert_convolutions import read_convolution_sizes
from te_export.models.task_expert_layers import final_relu_of
from te_export.models.task_expert_shapes import (
    check_shapes,
    is_convolutional,
    looks_like_task_expert,
    read_sizes,
    stored_in_out,
)
from te_export.models.task_names import name_tasks, select_tasks

__all__ = ["JointTaskExpert", "load_task_expert"]

_TRAINING_SETTINGS = {"dropout", "learning_rate", "weight_decay"}


class JointTaskExpert(nn.Module):
    """All exported tasks of a TaskExpert model behind one forward; the trunk runs once.

    forward: x (B, input_dim) or (B, C, H, W) → (expert features (B, K, D), prediction (B, out), routing weights (B, K),
        prediction, …).
    """

    def __init__(self, model: TaskExpertModel, task_ids: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.task_ids = tuple(task_ids)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        expert_features = self.model.trunk(x)
        tails = self.model.tails(expert_features, self.task_ids)
        return (expert_features, *(value for tail in tails for value in tail))


def load_task_expert(
    checkpoint: Checkpoint, *, task_names: Sequence[str] | None, tasks: Sequence[str] | None
) -> ExportableModel:
    """Build the model of a checkpoint.

    Args:
        task_names: a name for each task of the checkpoint, or None.
        tasks: the tasks to export, or None for all.

    Raises:
        CheckpointError: not a TaskExpert state dict; tensors missing, extra, misshaped, of another dtype,
            NaN or infinite; config and shapes disagree.
        UsageError: a task name is unknown or not allowed.
    """
    try:
        return _load(checkpoint, task_names=task_names, tasks=tasks)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _load(
    checkpoint: Checkpoint, *, task_names: Sequence[str] | None, tasks: Sequence[str] | None
) -> ExportableModel:
    state, notes = _usable_state(checkpoint)
    config, config_notes = _settle_config(checkpoint, state)
    check_shapes(state, config, "the sizes most of its tensors agree on")
    names = name_tasks(config.num_tasks, asked=task_names, in_file=checkpoint.task_names)
    task_ids = select_tasks(names, tasks)
    require_finite(state)
    return _exportable(
        state, config, names=names, task_ids=task_ids, notes=(*checkpoint.notes, *notes, *config_notes)
    )


def _usable_state(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], list[str]]:
    state = dict(checkpoint.state)
    if not looks_like_task_expert(state):
        first = "\n  ".join(f"{name} {list(tensor.shape)}" for name, tensor in list(state.items())[:8])
        raise CheckpointError(
            "not a TaskExpert checkpoint: expected tensors named backbone.network.* (or "
            "backbone.convolutions.* and backbone.projection.*), "
            "experts.N.network.*, "
            f"gating_networks.N.gate.*, task_heads.N.head.*; found {len(state)} tensors, the first of "
            f"them:\n  {first}\n"
            "TaskExpert, shared-component and task-branch models are known by their parameter names: if this is one, "
            "save model.state_dict() under its own. For any other module name the code that builds it: --model "
            "package.module:factory --example-input F.npz"
        )
    notes = []
    if stored_in_out(state):
        state = {name: tensor.t() if tensor.ndim == 2 else tensor for name, tensor in state.items()}
        notes.append("weights are stored (in, out); they were transposed to torch's (out, in)")
    notes += require_floats(state)
    return state, notes


def _settle_config(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> tuple[TaskExpertConfig, list[str]]:
    found = dict(checkpoint.config or {})
    kind, sizes = _read_sizes(state, found, checkpoint.config_source)
    conflicts = [
        f"{name}: {_listed(found[name])} in {checkpoint.config_source}, {_listed(size)} by the shapes of the "
        "tensors"
        for name, size in sizes.items()
        if found.get(name) is not None and _listed(found[name]) != _listed(size)
    ]
    if conflicts:
        raise CheckpointError(
            "the config in the file and its tensors disagree:\n  " + "\n  ".join(conflicts) + "\n"
            "Save the checkpoint again with the config it was trained with, or without any config."
        )
    known = {field.name for field in dataclasses.fields(kind)} | {"task_names"}
    settings = _training_settings(found)
    ignored = sorted(shown(name) for name in found if name not in known)
    ignored += sorted(set(found) & _TRAINING_SETTINGS - set(settings))
    notes = (
        [f"config keys that do not change the exported graphs were ignored: {', '.join(ignored)}"]
        if ignored
        else []
    )
    try:
        config = kind(
            **sizes,
            **settings,
            final_relu=final_relu_of(checkpoint.layer_types, _final_relu_in_config(checkpoint, found)),
        )
    except ValueError as error:
        raise CheckpointError(f"no TaskExpert model has this config: {error}") from error
    return config, notes


def _read_sizes(
    state: Mapping[str, Tensor], found: Mapping[str, ConfigValue], source: str | None
) -> tuple[type[TaskExpertConfig], dict[str, Any]]:
    """Which config the model has, and all in it that the tensors tell."""
    if not is_convolutional(state):
        return TaskExpertConfig, dataclasses.asdict(read_sizes(state))
    convolutions = read_convolution_sizes(state, found, source=source)
    sizes = read_sizes(state, input_dim=math.prod(convolutions.input_shape))
    return ConvolutionalTaskExpertConfig, {
        **dataclasses.asdict(sizes),
        **dataclasses.asdict(convolutions),
    }


def _final_relu_in_config(checkpoint: Checkpoint, found: Mapping[str, ConfigValue]) -> bool | None:
    value = found.get("final_relu")
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(
            f"final_relu in {checkpoint.config_source} is {value!r}, expected true or false"
        )
    return value


def _training_settings(found: Mapping[str, ConfigValue]) -> dict[str, Any]:
    """Settings that no graph depends on; kept for the record where they are numbers that make sense."""
    settings = {}
    for name in _TRAINING_SETTINGS:
        value = found.get(name)
        largest = 1.0 if name == "dropout" else sys.float_info.max
        if isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value < largest:
            settings[name] = float(value)
    return settings


def _listed(value: object) -> object:
    return list(value) if isinstance(value, list | tuple) else value


def _exportable(
    state: Mapping[str, Tensor],
    config: TaskExpertConfig,
    *,
    names: Sequence[str],
    task_ids: Sequence[int],
    notes: tuple[str, ...],
) -> ExportableModel:
    with torch.device("meta"):
        model = TaskExpertModel(config)
    tasks = tuple(
        TaskOutput(
            name=names[task],
            output_shape=(config.task_output_dims[task],),
            num_experts=config.num_experts,
            tail_parameters=_below(state, f"gating_networks.{task}.") | _below(state, f"task_heads.{task}."),
        )
        for task in task_ids
    )
    trunk = _below(state, "backbone.") | _below(state, "experts.")
    used = trunk.union(*(task.tail_parameters for task in tasks))
    _fill(model, {name: state[name] for name in used}, task_ids)
    unused = tuple(name for name in state if name not in used)
    fusion = [name for name in unused if name.startswith("feature_fusion.")]
    if fusion:
        notes = (
            *notes,
            f"{' and '.join(fusion)} are in the checkpoint and used by no prediction; they are not exported",
        )
    return ExportableModel(
        family="TaskExpert",
        config=dataclasses.asdict(config),
        module=JointTaskExpert(model, task_ids).eval(),
        inputs=(ModelInput("x", "float32", config.input_row_shape),),
        tasks=tasks,
        expert_features=ExpertFeatures(config.num_experts, config.expert_dim),
        trunk_parameters=trunk,
        parameter_sizes={name: state[name].numel() for name in used},
        unused_parameters=unused,
        notes=notes,
        multiply_adds=_multiply_adds(config, sum(state[name].numel() for name in used)),
    )


def _multiply_adds(config: TaskExpertConfig, parameters: int) -> int:
    """Of one row where convolutions use a parameter more than once, else 0."""
    if not isinstance(config, ConvolutionalTaskExpertConfig):
        return 0
    return parameters + config.convolution_multiply_adds


def _fill(model: TaskExpertModel, used: Mapping[str, Tensor], task_ids: Sequence[int]) -> None:
    """Give the model its weights without a copy of those that are float32 already; what no exported task
    reads is left out.
    """
    model.feature_fusion = nn.Sequential()
    for task in set(range(model.config.num_tasks)) - set(task_ids):
        model.gating_networks[task] = nn.Identity()
        model.task_heads[task] = nn.Identity()
    weights = {name: tensor.to(torch.float32).contiguous() for name, tensor in used.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.eval().requires_grad_(False)


def _below(state: Mapping[str, Tensor], prefix: str) -> frozenset[str]:
    return frozenset(name for name in state if name.startswith(prefix))

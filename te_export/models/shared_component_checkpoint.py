"""From a checkpoint to a shared-component model: told by its parameter names, sizes read off the shapes.

The kinds of components and routings are part of the names, and every size is in a shape. Taken from the config are
image_shape, (3, 32, 32) where the file has none, and what changes no prediction: the kinds of the tasks (of kind
`classes` where nothing is said) and the training settings.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor

from te_export.checkpoint.contents import Checkpoint, ConfigValue
from te_export.errors import CheckpointError
from te_export.models.config_values import image_shape_in, training_settings
from te_export.models.loaded_module import LoadedModule
from te_export.models.shared_component import (
    ComponentKind,
    RoutingKind,
    SharedComponentConfig,
    SharedComponentModel,
    TaskKind,
)
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
from te_export.models.task_names import name_tasks

__all__ = ["is_shared_component", "load_shared_component"]

_OWN = re.compile(
    r"components\.\d+\.(convolutional|dense|profile)\.|routing\.\d+\.(gate\.|logits$)|heads\.\d+\."
)
_OTHER_FAMILIES = {
    "backbone",
    "experts",
    "gating_networks",
    "task_heads",
    "shared",
    "branches",
    "task_weights",
}
_EXAMPLE_ROWS = 64
_IMAGE_SHAPE = (3, 32, 32)
_TEXT_LISTS = {"component_kinds", "task_names", "task_kinds", "routing_kinds"}
_TOLD_BY_TENSORS = {
    "component_kinds",
    "component_widths",
    "feature_dim",
    "gate_dim",
    "task_output_dims",
    "routing_kinds",
}

_AXES: dict[str, Axes] = {
    "components.#.convolutional.0.weight": (("width of component #", 1), None, None, None),
    "components.#.convolutional.0.bias": (("width of component #", 1),),
    "components.#.convolutional.3.weight": (
        ("width of component #", 2),
        ("width of component #", 1),
        None,
        None,
    ),
    "components.#.convolutional.3.bias": (("width of component #", 2),),
    "components.#.convolutional.7.weight": (("feature_dim", 1), None),
    "components.#.convolutional.7.bias": (("feature_dim", 1),),
    "components.#.dense.1.weight": (("width of component #", 1), None),
    "components.#.dense.1.bias": (("width of component #", 1),),
    "components.#.dense.3.weight": (("feature_dim", 1), ("width of component #", 1)),
    "components.#.dense.3.bias": (("feature_dim", 1),),
    "components.#.profile.0.weight": (("width of component #", 1), None),
    "components.#.profile.0.bias": (("width of component #", 1),),
    "components.#.profile.2.weight": (("feature_dim", 1), ("width of component #", 1)),
    "components.#.profile.2.bias": (("feature_dim", 1),),
    "routing.#.gate.0.weight": (("gate_dim", 1), None),
    "routing.#.gate.0.bias": (("gate_dim", 1),),
    "routing.#.gate.2.weight": (None, ("gate_dim", 1)),
    "heads.#.weight": (("out of task #", 1), ("feature_dim", 1)),
    "heads.#.bias": (("out of task #", 1),),
}


def is_shared_component(state: Mapping[str, Tensor]) -> bool:
    """Whether the names have components, routings and heads as this family names them, and no part of another."""
    return has_parts(state, _OWN, {"components", "routing", "heads"}, others=_OTHER_FAMILIES)


def load_shared_component(checkpoint: Checkpoint, *, task_names: Sequence[str] | None = None) -> LoadedModule:
    """Build the model of a checkpoint.

    Args:
        task_names: a name for each task, or None for those in the file.

    Raises:
        CheckpointError: not of this family; tensors missing, unexpected, misshaped, of another dtype, NaN or
            infinite; config and tensors disagree.
        UsageError: a task name is not allowed, or there are too few or too many.
    """
    try:
        return _load(checkpoint, task_names)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _load(checkpoint: Checkpoint, task_names: Sequence[str] | None) -> LoadedModule:
    state = checkpoint.state
    if not is_shared_component(state):
        raise CheckpointError(
            "not a shared-component checkpoint: expected tensors named components.N.<kind>.*, routing.N.* and "
            f"heads.N.*; found {', '.join(list(state)[:8])}. Save model.state_dict() under its own parameter names."
        )
    notes = require_floats(state)
    tasks = max(count_below(state, "heads"), count_below(state, "routing"))
    names = name_tasks(tasks, asked=task_names, in_file=checkpoint.task_names)
    config = _settle_config(checkpoint, names)
    with torch.device("meta"):
        model = SharedComponentModel(config)
    shape = f"image_shape {list(config.image_shape)}"
    require_fit(
        state, model, what=f"a shared-component model of {shape} with the sizes most tensors agree on"
    )
    require_layers(checkpoint.layer_types, model)
    require_finite(state)
    fill(model, state)
    generator = torch.Generator().manual_seed(0)
    return LoadedModule(
        family="SharedComponent",
        config=_recorded(config),
        module=model,
        input_name="x",
        example_inputs=torch.rand((_EXAMPLE_ROWS, *config.image_shape), generator=generator),
        task_names=names,
        unused_parameters=(),
        notes=(*checkpoint.notes, *notes),
    )


def _settle_config(checkpoint: Checkpoint, names: tuple[str, ...]) -> SharedComponentConfig:
    found = dict(checkpoint.config or {})
    source = checkpoint.config_source
    state = checkpoint.state
    kinds = _component_kinds(state)
    routing = _routing_kinds(state, tasks=len(names))
    sizes = read_sizes(state, _AXES)
    try:
        config = SharedComponentConfig(
            component_kinds=kinds,
            component_widths=tuple(
                size_of(sizes, f"width of component {index}", told_by=f"components.{index}.{kind}.*")
                for index, kind in enumerate(kinds)
            ),
            feature_dim=size_of(sizes, "feature_dim", told_by="heads.N.weight"),
            gate_dim=size_of(sizes, "gate_dim", told_by="routing.N.gate.*") if "learned" in routing else 1,
            task_output_dims=tuple(
                size_of(sizes, f"out of task {task}", told_by=f"heads.{task}.*") for task in range(len(names))
            ),
            routing_kinds=routing,
            task_names=names,
            task_kinds=_task_kinds(found, source, tasks=len(names)),
            image_shape=image_shape_in(found, "image_shape", source=source) or _IMAGE_SHAPE,
            **training_settings(found, ("learning_rate", "weight_decay")),
        )
    except ValueError as error:
        raise CheckpointError(f"no shared-component model has this config: {error}") from error
    told = _TOLD_BY_TENSORS if "learned" in routing else _TOLD_BY_TENSORS - {"gate_dim"}
    require_agreement(found, {name: getattr(config, name) for name in sorted(told)}, source)
    return config


def _component_kinds(state: Mapping[str, Tensor]) -> tuple[ComponentKind, ...]:
    """The kind of every component: the one that most names below it have."""
    kinds: list[ComponentKind] = []
    for index in range(count_below(state, "components")):
        below = {
            kind: _count_starting(state, f"components.{index}.{kind}.") for kind in get_args(ComponentKind)
        }
        kind = max(below, key=lambda name: below[name])
        if not below[kind]:
            raise CheckpointError(
                f"component {index} is missing: expected tensors named components.{index}.<kind>.*, the kind one of "
                f"{', '.join(below)}; found none. Save the whole model.state_dict()."
            )
        kinds.append(kind)
    return tuple(kinds)


def _routing_kinds(state: Mapping[str, Tensor], *, tasks: int) -> tuple[RoutingKind, ...]:
    return tuple("fixed" if f"routing.{task}.logits" in state else "learned" for task in range(tasks))


def _count_starting(state: Mapping[str, Tensor], prefix: str) -> int:
    return sum(name.startswith(prefix) for name in state)


def _task_kinds(found: Mapping[str, ConfigValue], source: str | None, *, tasks: int) -> tuple[TaskKind, ...]:
    """From the config; `classes` where it says nothing."""
    value = found.get("task_kinds")
    if value is None:
        return tuple("classes" for _ in range(tasks))
    known: dict[object, TaskKind] = {kind: kind for kind in get_args(TaskKind)}
    given = value if isinstance(value, tuple) else ()
    kinds = tuple(known[each] for each in given if each in known)
    if len(given) != tasks or len(kinds) != tasks:
        raise CheckpointError(
            f"task_kinds in {source} is {list(value) if isinstance(value, tuple) else value!r}, expected one of "
            f"{' and '.join(get_args(TaskKind))} for each of {tasks} tasks"
        )
    return kinds


def _recorded(config: SharedComponentConfig) -> dict[str, bool | int | float | str | tuple[int, ...]]:
    """The config as a manifest takes it: lists of texts joined by commas."""
    return {
        name: ",".join(value) if name in _TEXT_LISTS else value
        for name, value in dataclasses.asdict(config).items()
    }

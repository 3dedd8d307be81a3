"""Finds the state dict in what a checkpoint holds, and what lies beside it: config, task names, layer types.

state dict                                   a raw state dict
{"state_dict" | "model" | …: state dict, …}  with config, optimizer, epoch beside it
module                                       a whole pickled module, also under one of those keys
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from te_export.checkpoint.contents import ConfigValue
from te_export.checkpoint.find_config import find_config, find_task_names
from te_export.checkpoint.shown import shown
from te_export.checkpoint.sound_state import require_sound_state
from te_export.checkpoint.values import (
    Module,
    ModuleContents,
    OpenValue,
    Other,
    Record,
    Scalar,
    Table,
    TensorValue,
    Value,
)
from te_export.checkpoint.values import Sequence as SequenceValue
from te_export.errors import CheckpointError

__all__ = ["FoundModel", "find_model"]

STATE_KEYS: Final = (
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "module",
    "net",
    "network",
    "weights",
    "ema_state_dict",
    "model_ema",
    "ema",
)
_PREFIXES: Final = ("module.", "_orig_mod.", "model.")
_MAX_NESTING: Final = 4
_MAX_SHOWN: Final = 5
_MAX_NAME_CHARACTERS: Final = 1024


@dataclass(frozen=True)
class FoundModel:
    """The model in a checkpoint; the fields are those of `Checkpoint`."""

    state: Mapping[str, torch.Tensor]
    config: Mapping[str, ConfigValue] | None
    config_source: str | None
    task_names: tuple[str, ...] | None
    layer_types: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """Where the model is: its state dict, the dicts that lies in (innermost first), what was passed over."""

    state: Mapping[object, object] | Mapping[str, object]
    module: ModuleContents | None
    around: tuple[Table, ...]
    notes: tuple[str, ...]


def find_model(root: object, open_value: OpenValue) -> FoundModel:
    """Find the model in a checkpoint's top-level object.

    Args:
        root: the object, as its container gives it.
        open_value: opens values of that container.

    Raises:
        CheckpointError: no state dict, an empty one, or one with other things than tensors in it.
    """
    place = _locate(root, open_value)
    notes = list(place.notes)
    module = place.module
    state, removed = _without_prefixes(_load(_require_names(place.state), open_value))
    layer_types = _paths_below(module.layer_types, removed) if module else {}
    if removed:
        notes.append(f"prefix {removed!r} was removed from every parameter name")
    config = find_config(place.around, module, open_value)
    notes.extend(module.notes if module else ())
    notes.extend(config.notes)
    names = find_task_names(place.around, config.values, open_value)
    return FoundModel(state, config.values, config.source, names, layer_types, tuple(notes))


def _locate(root: object, open_value: OpenValue) -> _Place:
    value = open_value(root)
    around: list[Table] = []
    notes: list[str] = []
    for _ in range(_MAX_NESTING):
        if not isinstance(value, Table):
            break
        keys = [
            key for key in STATE_KEYS if key in value.items and _may_hold_model(value.items[key], open_value)
        ]
        if not keys:
            break
        if len(keys) > 1:
            notes.append(f"{keys[0]!r} was taken, {', '.join(map(repr, keys[1:]))} ignored")
        around.insert(0, value)
        value = open_value(value.items[keys[0]])
    if isinstance(value, Module):
        contents = value.read()
        return _Place(contents.state, contents, tuple(around), tuple(notes))
    if isinstance(value, Table) and _has_tensors(value, open_value):
        return _Place(value.items, None, tuple(around), tuple(notes))
    raise CheckpointError(_nothing_found(value, open_value, inside=bool(around)))


def _may_hold_model(raw: object, open_value: OpenValue) -> bool:
    value = open_value(raw)
    if isinstance(value, Table):
        return _has_tensors(value, open_value) or any(key in value.items for key in STATE_KEYS)
    return isinstance(value, Module)


def _has_tensors(table: Table, open_value: OpenValue) -> bool:
    return any(isinstance(open_value(raw), TensorValue) for raw in table.items.values())


def _nothing_found(value: Value, open_value: OpenValue, *, inside: bool) -> str:
    usual = ", ".join(repr(key) for key in STATE_KEYS[:3])
    if not isinstance(value, Table):
        return (
            f"holds {_kind(value)}, expected a state dict, a dict with one under {usual}, or a module; "
            "save model.state_dict()"
        )
    where = "the innermost dict" if inside else "the file"
    if not value.items:
        return (
            f"{where} holds an empty state dict, expected parameters; was the model saved before it was made?"
        )
    found = [
        f"{shown(key)} ({_kind(open_value(raw))})" for key, raw in list(value.items.items())[:_MAX_SHOWN]
    ]
    more = f" and {len(value.items) - _MAX_SHOWN} more" if len(value.items) > _MAX_SHOWN else ""
    return (
        f"{where} holds no state dict: it has {', '.join(found)}{more}, expected tensors or one of the "
        f"keys {usual}; save model.state_dict()"
    )


def _require_names(items: Mapping[object, object] | Mapping[str, object]) -> dict[str, object]:
    named = {key: value for key, value in items.items() if isinstance(key, str) and _is_name(key)}
    bad = [key for key in items if key not in named]
    if bad:
        listed = ", ".join(shown(key) for key in bad[:_MAX_SHOWN])
        raise CheckpointError(
            f"the state dict has {len(bad)} keys that are no parameter names ({listed}), expected printable "
            f"text of at most {_MAX_NAME_CHARACTERS} characters"
        )
    named.pop("_metadata", None)
    return named


def _is_name(key: str) -> bool:
    return len(key) <= _MAX_NAME_CHARACTERS and key.isprintable()


def _load(raw: Mapping[str, object], open_value: OpenValue) -> dict[str, torch.Tensor]:
    opened = {key: open_value(value) for key, value in raw.items()}
    bad = [
        f"{shown(key)} ({_kind(value)})"
        for key, value in opened.items()
        if not isinstance(value, TensorValue)
    ]
    if bad:
        more = f" and {len(bad) - _MAX_SHOWN} more" if len(bad) > _MAX_SHOWN else ""
        raise CheckpointError(
            f"the state dict holds other things than tensors: {', '.join(bad[:_MAX_SHOWN])}{more}; save "
            "model.state_dict() under its own key, beside them"
        )
    state: dict[str, torch.Tensor] = {}
    for key, value in opened.items():
        if isinstance(value, TensorValue):
            try:
                state[key] = value.load()
            except CheckpointError as error:
                raise CheckpointError(f"parameter {shown(key)}: {error}") from error
    if not state:
        raise CheckpointError("the model has no parameters, expected some; was it saved before it was built?")
    require_sound_state(state)
    return state


def _without_prefixes(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """Remove wrapper prefixes that every name has, also several in a row; return what was removed."""
    removed = ""
    while prefix := next((each for each in _PREFIXES if all(_is_below(key, each) for key in state)), ""):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
        removed += prefix
    return state, removed


def _is_below(key: str, prefix: str) -> bool:
    return key.startswith(prefix) and len(key) > len(prefix)


def _paths_below(layer_types: Mapping[str, str], removed: str) -> dict[str, str]:
    if not removed:
        return dict(layer_types)
    below = {
        path.removeprefix(removed): kind for path, kind in layer_types.items() if path.startswith(removed)
    }
    root = layer_types.get(removed.removesuffix("."))
    return {"": root, **below} if root else below


def _kind(value: Value) -> str:
    match value:
        case Table():
            return "a dict"
        case Record(class_name=name) | Module(class_name=name):
            return f"a {name}"
        case TensorValue():
            return "a tensor"
        case Scalar(value=scalar):
            return shown(scalar)
        case SequenceValue(values=values):
            return f"a list of {len(values)}"
        case Other(description=description):
            return description

"""Finds the model's config and the names of its tasks, beside the state dict or in a pickled module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from te_export.checkpoint.contents import ConfigValue
from te_export.checkpoint.shown import shown
from te_export.checkpoint.values import ModuleContents, OpenValue, Record, Scalar, Table
from te_export.checkpoint.values import Sequence as SequenceValue

__all__ = ["FoundConfig", "find_config", "find_task_names"]

_CONFIG_KEYS: Final = ("config", "model_config")
_SETTINGS_KEYS: Final = ("hyper_parameters", "hparams", "args")
_INNER_KEYS: Final = ("model", "config", "model_config")
_MARKERS: Final = ("expert_dim", "num_experts")
_TASK_NAMES: Final = "task_names"
_MAX_FIELDS: Final = 1000
_MAX_LIST: Final = 10_000
_MAX_SHOWN: Final = 5


@dataclass(frozen=True)
class FoundConfig:
    """The config, or None where there is none; `source` says where it was."""

    values: Mapping[str, ConfigValue] | None
    source: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Candidate:
    source: str
    fields: Mapping[str, object]
    is_config_by_key: bool


def find_config(around: Sequence[Table], module: ModuleContents | None, open_value: OpenValue) -> FoundConfig:
    """Find the config of the model.

    Keys `config` and `model_config` are taken for what they say; other keys only where they hold
    `expert_dim` or `num_experts`. Those that hold one of the two come first.

    Args:
        around: the dicts the state dict lies in, innermost first.
        module: the pickled module, where there is one.
        open_value: opens values of the container.
    """
    candidates = list(_candidates(around, module, open_value))
    marked = [each for each in candidates if any(marker in each.fields for marker in _MARKERS)]
    chosen = next(iter(marked + [each for each in candidates if each.is_config_by_key]), None)
    if chosen is None:
        return FoundConfig(None, None, ())
    values: dict[str, ConfigValue] = {}
    ignored: list[str] = []
    for name, raw in list(chosen.fields.items())[:_MAX_FIELDS]:
        kept, value = _plain(raw, open_value)
        if kept:
            values[name] = value
        else:
            ignored.append(name)
    notes: tuple[str, ...] = ()
    if ignored:
        more = f" and {len(ignored) - _MAX_SHOWN} more" if len(ignored) > _MAX_SHOWN else ""
        listed = ", ".join(shown(name) for name in ignored[:_MAX_SHOWN])
        notes = (
            f"in the config, {listed}{more} ignored: neither a plain value nor a list of texts or integers",
        )
    return FoundConfig(values, chosen.source, notes)


def find_task_names(
    around: Sequence[Table], config: Mapping[str, ConfigValue] | None, open_value: OpenValue
) -> tuple[str, ...] | None:
    """Names of the tasks, from the key `task_names` beside the state dict, else from the config."""
    for table in around:
        if _TASK_NAMES in table.items:
            _, value = _plain(table.items[_TASK_NAMES], open_value)
            names = _names(value)
            if names is not None:
                return names
    return _names(config.get(_TASK_NAMES)) if config else None


def _candidates(
    around: Sequence[Table], module: ModuleContents | None, open_value: OpenValue
) -> Iterator[_Candidate]:
    for table in around:
        for key in (*_CONFIG_KEYS, *_SETTINGS_KEYS):
            if key in table.items:
                yield from _at(repr(key), table.items[key], open_value, is_config_by_key=key in _CONFIG_KEYS)
    if module is not None and "config" in module.attributes:
        source = f"the config of the pickled {module.class_name}"
        yield from _at(source, module.attributes["config"], open_value, is_config_by_key=True)


def _at(source: str, raw: object, open_value: OpenValue, *, is_config_by_key: bool) -> Iterator[_Candidate]:
    """The config at a place, and the configs one level inside it (`config.model`)."""
    opened = open_value(raw)
    if not isinstance(opened, Table | Record):
        return
    fields = _fields(opened)
    kind = opened.class_name if isinstance(opened, Record) else "dict"
    yield _Candidate(f"{source} (a {kind})", fields, is_config_by_key)
    for key in _INNER_KEYS:
        inner = open_value(fields[key]) if key in fields else None
        if isinstance(inner, Table | Record):
            yield _Candidate(f"{source}, its {key!r}", _fields(inner), is_config_by_key=False)


def _fields(opened: Table | Record) -> dict[str, object]:
    items: Mapping[str, object] | Mapping[object, object]
    items = opened.items if isinstance(opened, Table) else opened.fields
    return {key: value for key, value in items.items() if isinstance(key, str) and key.isprintable()}


def _plain(raw: object, open_value: OpenValue) -> tuple[bool, ConfigValue]:
    """Whether the value can stand in a config, and the value."""
    opened = open_value(raw)
    if isinstance(opened, Scalar):
        return _is_text_printable(opened.value), opened.value
    if isinstance(opened, SequenceValue) and len(opened.values) <= _MAX_LIST:
        texts = tuple(each for each in opened.values if isinstance(each, str) and each.isprintable())
        if len(texts) == len(opened.values):
            return True, texts
        numbers = tuple(
            each for each in opened.values if isinstance(each, int) and not isinstance(each, bool)
        )
        if len(numbers) == len(opened.values):
            return True, numbers
    return False, None


def _is_text_printable(value: bool | int | float | str | None) -> bool:
    return value.isprintable() if isinstance(value, str) else True


def _names(value: ConfigValue) -> tuple[str, ...] | None:
    if isinstance(value, str):
        names = tuple(name.strip() for name in value.split(","))
    elif isinstance(value, tuple):
        names = tuple(name for name in value if isinstance(name, str))
    else:
        return None
    return names or None

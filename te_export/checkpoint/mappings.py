"""Dicts as a pickle describes them: plain ones, and OrderedDict and its like, which are records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from te_export.checkpoint.inert import Inert, Name
from te_export.checkpoint.work_limit import WorkLimit

__all__ = ["as_mapping"]

_MAPPING_NAMES: Final = {
    Name("builtins", "dict"),
    Name("collections", "OrderedDict"),
    Name("collections", "defaultdict"),
    Name("collections", "Counter"),
}


def as_mapping(value: object, limit: WorkLimit) -> Mapping[object, object] | None:
    """The keys and values of a dict, or of a record of one; None where the value is something else."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, Inert) or value.name not in _MAPPING_NAMES:
        return None
    mapping: dict[object, object] = {}
    for (
        argument
    ) in value.arguments:  # dict(…) or OrderedDict([[key, value], …]); a defaultdict's factory is neither
        limit.spend(len(argument) if isinstance(argument, dict | list) else 0)
        if isinstance(argument, dict):
            mapping.update(argument)
        elif isinstance(argument, list):
            entries = [entry for entry in argument if isinstance(entry, list | tuple) and len(entry) == 2]
            if len(entries) != len(argument) or not all(isinstance(entry[0], str) for entry in entries):
                return None
            mapping.update((entry[0], entry[1]) for entry in entries)
    limit.spend(len(value.pairs))
    mapping.update(value.pairs)
    return mapping

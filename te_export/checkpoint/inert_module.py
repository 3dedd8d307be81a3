"""A whole pickled torch module, taken apart without making it: parameters, buffers, layers, attributes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from te_export.checkpoint.inert import Inert
from te_export.checkpoint.mappings import as_mapping
from te_export.checkpoint.shown import shown
from te_export.checkpoint.values import ModuleContents
from te_export.checkpoint.work_limit import WorkLimit
from te_export.errors import CheckpointError

__all__ = ["is_module", "read_module"]

_WRAPPERS: Final = {"DataParallel", "DistributedDataParallel"}
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks")
_MAX_MODULES: Final = 200_000
_MAX_DEPTH: Final = 64
_MAX_PATH_CHARACTERS: Final = 1024


def is_module(value: object) -> bool:
    """Whether the record is one of a torch module."""
    fields = _fields(value)
    return "_parameters" in fields and "_modules" in fields


def read_module(record: Inert, limit: WorkLimit) -> ModuleContents:
    """Collect what the module's state_dict() would hold, in its order, and the class of every submodule.

    Raises:
        CheckpointError: the modules nest too deep (or in a circle), or are too many.
    """
    inner = record
    notes: list[str] = []
    while _class_name(inner) in _WRAPPERS and len(notes) < _MAX_DEPTH:
        child = (as_mapping(_fields(inner).get("_modules"), limit) or {}).get("module")
        if not isinstance(child, Inert) or not is_module(child):
            break
        notes.append(f"the model was taken out of a {_class_name(inner)}")
        inner = child
    state: dict[str, object] = {}
    layer_types: dict[str, str] = {}
    hooked: list[str] = []
    for path, module in _submodules(inner, limit):
        layer_types[path] = _class_name(module)
        prefix = f"{path}." if path else ""
        state.update((prefix + name, value) for name, value in _own_state(module, limit))
        if any(as_mapping(_fields(module).get(hooks), limit) for hooks in _HOOKS):
            hooked.append(path or _class_name(module))
    if hooked:
        notes.append(f"forward hooks were ignored ({', '.join(shown(path) for path in hooked[:5])})")
    attributes = {
        name: value for name, value in _fields(inner).items() if isinstance(name, str) and name[:1] != "_"
    }
    return ModuleContents(_class_name(inner), state, layer_types, attributes, tuple(notes))


def _submodules(root: Inert, limit: WorkLimit) -> Iterator[tuple[str, Inert]]:
    """Yield path and record of the module and all below it, parents first, as torch orders them."""
    waiting: list[tuple[str, int, Inert]] = [("", 0, root)]
    for _ in range(_MAX_MODULES):
        if not waiting:
            return
        path, depth, module = waiting.pop()
        yield path, module
        children = as_mapping(_fields(module).get("_modules"), limit) or {}
        limit.spend(len(children))
        for name, child in reversed(list(children.items())):
            if child is None:  # a submodule that was set to None
                continue
            if not isinstance(name, str) or not isinstance(child, Inert) or not is_module(child):
                raise CheckpointError(
                    f"submodule {shown(name)} of {shown(path)} is no module; the file is damaged"
                )
            child_path = f"{path}.{name}" if path else name
            if depth == _MAX_DEPTH or len(child_path) > _MAX_PATH_CHARACTERS:
                raise CheckpointError(
                    f"modules nest deeper than {_MAX_DEPTH}, or in a circle; save the state_dict()"
                )
            waiting.append((child_path, depth + 1, child))
            if len(waiting) > _MAX_MODULES:
                break
    raise CheckpointError(
        f"the model has more than {_MAX_MODULES} modules, expected fewer; save the state_dict()"
    )


def _own_state(module: Inert, limit: WorkLimit) -> Iterator[tuple[str, object]]:
    fields = _fields(module)
    skipped = _names_in_set(fields.get("_non_persistent_buffers_set"), limit)
    for kind in ("_parameters", "_buffers"):
        own = as_mapping(fields.get(kind), limit) or {}
        limit.spend(len(own))
        for name, value in own.items():
            if not isinstance(name, str) or len(name) > _MAX_PATH_CHARACTERS:
                raise CheckpointError(f"a module has a parameter named {shown(name)}; the file is damaged")
            if value is not None and not (kind == "_buffers" and name in skipped):
                yield name, value


def _names_in_set(value: object, limit: WorkLimit) -> frozenset[str]:
    """The texts in a set, or in the record `set([…])` that protocols before 4 make of one."""
    if isinstance(value, Inert) and value.arguments:
        value = value.arguments[0]
    members = value if isinstance(value, set | frozenset | list) else ()
    limit.spend(len(members))
    return frozenset(member for member in members if isinstance(member, str))


def _fields(value: object) -> Mapping[object, object]:
    if not isinstance(value, Inert) or not isinstance(value.state, dict):
        return {}
    return value.state


def _class_name(module: Inert) -> str:
    return module.name.qualname.rpartition(".")[2] if module.name else "object"

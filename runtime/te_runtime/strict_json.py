"""JSON to frozen dataclasses and back, refusing whatever the dataclass does not name.

The decoder is driven by the type annotations: str, int, float, bool, Literal, None, X | None, tuple[X, ...],
dict[str, X] and nested dataclasses. Unknown keys, missing keys, repeated keys, NaN, infinities, integers
beyond 64 bits, characters that cannot be printed, and values of another type are refused with the path of the
offending value, for example `variants[0].joint.path`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

__all__ = ["StrictJsonError", "decode", "encode"]

T = TypeVar("T")

_KIND_NAMES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}


class StrictJsonError(ValueError):
    """The text is not JSON, or not the JSON that the dataclass describes."""


def decode(text: str, cls: type[T]) -> T:
    """Parse JSON text into `cls`.

    Args:
        text: a JSON document whose top level is an object.
        cls: a dataclass whose fields use only the annotations named in the module's docstring.

    Raises:
        StrictJsonError: with the path of the first value that does not fit.
    """
    try:
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError as error:
        raise StrictJsonError("nested too deeply") from error
    except StrictJsonError:
        raise
    except ValueError as error:
        raise StrictJsonError(f"not JSON: {error}") from error
    return typing.cast(T, _value(data, cls, ""))


def encode(value: object) -> str:
    """Write a dataclass as JSON: fields in declared order, a newline at the end, always the same bytes."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"expected a dataclass instance, got {type(value).__name__}")
    return json.dumps(dataclasses.asdict(value), indent=1, allow_nan=False, ensure_ascii=True) + "\n"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise StrictJsonError(f"key {key!r:.80} stands twice in one object")
        if not key.isprintable():
            raise StrictJsonError(f"key {key!r:.80} holds a character that cannot be printed")
        seen[key] = value
    return seen


def _constant(name: str) -> float:
    raise StrictJsonError(f"{name} is not allowed")


def _fail(where: str, expected: str, found: object) -> StrictJsonError:
    kind = "null" if found is None else _KIND_NAMES.get(type(found), type(found).__name__)
    shown = f" {found!r:.80}" if isinstance(found, str | int | float) and not isinstance(found, bool) else ""
    return StrictJsonError(f"{where or 'top level'}: expected {expected}, found {kind}{shown}")


def _value(data: object, annotation: Any, where: str) -> object:
    origin = typing.get_origin(annotation)
    if dataclasses.is_dataclass(annotation):
        return _dataclass(data, typing.cast(Any, annotation), where)
    if origin in (typing.Union, types.UnionType):
        return _union(data, typing.get_args(annotation), where)
    if origin is typing.Literal:
        return _literal(data, typing.get_args(annotation), where)
    if origin is tuple:
        if not isinstance(data, list):
            raise _fail(where, "array", data)
        item = typing.get_args(annotation)[0]
        return tuple(_value(entry, item, f"{where}[{index}]") for index, entry in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise _fail(where, "object", data)
        item = typing.get_args(annotation)[1]
        return {key: _value(entry, item, f"{where}.{key:.80}") for key, entry in data.items()}
    return _scalar(data, annotation, where)


def _scalar(data: object, annotation: Any, where: str) -> object:
    if annotation is float and type(data) in (int, float):
        number = typing.cast(float, data)
        if not -sys.float_info.max <= number <= sys.float_info.max:
            raise StrictJsonError(f"{where}: expected a number that float64 can hold")
        return float(number)
    if isinstance(data, str) and not data.isprintable():
        # A control character would reach terminals, and a lone surrogate could not be written at all.
        raise StrictJsonError(f"{where}: {data!r:.80} holds a character that cannot be printed")
    if type(data) is int and annotation is int and not -(2**63) <= data < 2**63:
        raise StrictJsonError(f"{where}: expected an integer that 64 bits can hold")
    if annotation in (str, int, bool) and type(data) is annotation:
        return data
    if annotation is type(None) and data is None:
        return None
    raise _fail(where, _KIND_NAMES.get(annotation, "null"), data)


def _union(data: object, choices: tuple[Any, ...], where: str) -> object:
    if data is None and type(None) in choices:
        return None
    kept = [choice for choice in choices if choice is not type(None)]
    if len(kept) == 1:
        return _value(data, kept[0], where)
    for choice in kept:
        if type(data) is choice or (typing.get_origin(choice) is tuple and isinstance(data, list)):
            return _value(data, choice, where)
    if float in kept and type(data) is int:
        return _value(data, float, where)
    raise _fail(where, " or ".join(_KIND_NAMES.get(choice, "array") for choice in kept), data)


def _literal(data: object, choices: tuple[Any, ...], where: str) -> object:
    for choice in choices:
        if type(data) is type(choice) and data == choice:
            return data
    raise _fail(where, " or ".join(repr(choice) for choice in choices), data)


@functools.cache
def _annotations(cls: type[Any]) -> Mapping[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _dataclass(data: object, cls: Any, where: str) -> object:
    if not isinstance(data, dict):
        raise _fail(where, "object", data)
    annotations = _annotations(cls)
    unknown = sorted(set(data) - set(annotations))
    if unknown:
        raise StrictJsonError(
            f"{where or 'top level'}: unknown key {unknown[0]!r:.80}; known keys: {', '.join(annotations)}"
        )
    missing = [name for name in annotations if name not in data]
    if missing:
        raise StrictJsonError(f"{where or 'top level'}: key {missing[0]!r} is missing")
    prefix = f"{where}." if where else ""
    values = {name: _value(data[name], hint, prefix + name) for name, hint in annotations.items()}
    try:
        return cls(**values)
    except StrictJsonError as error:
        raise StrictJsonError(f"{where or 'top level'}: {error}") from error

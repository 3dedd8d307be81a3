"""JSON to named tuples and back, refusing whatever the class does not name.

The decoder is driven by the type annotations: str, int, float, bool, Literal, None, X | None, tuple[X, ...],
dict[str, X] and nested named tuples. A class that has a method `check` may refuse values by raising
StrictJsonError. A key may be missing only where its field has a default, which it then has. Unknown keys, other
missing keys, repeated keys, NaN, infinities, integers beyond 64 bits, characters that cannot be printed, and values
of another type are refused with the path of the offending value, for example `variants[0].joint.path`.
"""

from __future__ import annotations

import functools
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

__all__ = ["StrictJsonError", "decode", "encode", "plain"]

T = TypeVar("T")
_Decoder: TypeAlias = Callable[[object, str], object]

_KIND_NAMES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}


class StrictJsonError(ValueError):
    """The text is not JSON, or not the JSON that the class describes."""


def decode(text: str, cls: type[T]) -> T:
    """Parse JSON text into `cls`.

    Args:
        text: a JSON document whose top level is an object.
        cls: a NamedTuple whose fields use only the annotations named in the module's docstring.

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


def encode(value: NamedTuple) -> str:
    """Write a named tuple as JSON: fields in declared order, a newline at the end, always the same bytes."""
    if not _is_record(type(value)):
        raise TypeError(f"expected an instance of a NamedTuple, got {type(value).__name__}")
    return json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=True) + "\n"


def plain(value: object) -> Any:
    """A named tuple and all in it as dicts, lists and scalars, which is what JSON has."""
    if isinstance(value, tuple):
        if _is_record(type(value)):
            return {name: plain(entry) for name, entry in zip(_fields(value), value, strict=True)}
        return [plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return value


def _is_record(cls: object) -> bool:
    return isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields")


def _fields(value: object) -> tuple[str, ...]:
    return typing.cast("tuple[str, ...]", typing.cast(Any, value)._fields)


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
    return _decoder(annotation)(data, where)


@functools.cache
def _decoder(annotation: Any) -> _Decoder:
    """What decodes values of one annotation; worked out once, since a manifest holds thousands of values."""
    origin = typing.get_origin(annotation)
    choices = typing.get_args(annotation)
    if _is_record(annotation):
        return functools.partial(_record, annotation)
    if origin in (typing.Union, types.UnionType):
        return functools.partial(_union, choices)
    if origin is typing.Literal:
        return functools.partial(_literal, choices)
    if origin is tuple:
        return functools.partial(_array, choices[0])
    if origin is dict:
        return functools.partial(_mapping, choices[1])
    return functools.partial(_scalar, annotation)


def _array(item: Any, data: object, where: str) -> object:
    if not isinstance(data, list):
        raise _fail(where, "array", data)
    decode_item = _decoder(item)
    return tuple([decode_item(entry, f"{where}[{index}]") for index, entry in enumerate(data)])


def _mapping(item: Any, data: object, where: str) -> object:
    if not isinstance(data, dict):
        raise _fail(where, "object", data)
    return {key: _value(entry, item, f"{where}.{key:.80}") for key, entry in data.items()}


def _scalar(annotation: Any, data: object, where: str) -> object:
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


def _union(choices: tuple[Any, ...], data: object, where: str) -> object:
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


def _literal(choices: tuple[Any, ...], data: object, where: str) -> object:
    for choice in choices:
        if type(data) is type(choice) and data == choice:
            return data
    raise _fail(where, " or ".join(repr(choice) for choice in choices), data)


@functools.cache
def _annotations(cls: type[Any]) -> Mapping[str, Any]:
    hints = typing.get_type_hints(cls)
    return {name: hints[name] for name in cls._fields}


def _record(cls: Any, data: object, where: str) -> object:
    if not isinstance(data, dict):
        raise _fail(where, "object", data)
    annotations = _annotations(cls)
    _check_keys(data, annotations, cls._field_defaults, where)
    prefix = f"{where}." if where else ""
    record = cls(
        **{
            name: _value(data[name], hint, prefix + name)
            for name, hint in annotations.items()
            if name in data
        }
    )
    if hasattr(record, "check"):
        try:
            record.check()
        except StrictJsonError as error:
            raise StrictJsonError(f"{where or 'top level'}: {error}") from error
    return record


def _check_keys(
    data: Mapping[str, object], known: Mapping[str, object], defaults: Mapping[str, object], where: str
) -> None:
    if data.keys() == known.keys():
        return
    place = where or "top level"
    unknown = sorted(data.keys() - known.keys())
    if unknown:
        raise StrictJsonError(f"{place}: unknown key {unknown[0]!r:.80}; known keys: {', '.join(known)}")
    for name in known:
        if name not in data and name not in defaults:
            raise StrictJsonError(f"{place}: key {name!r} is missing")

"""Reads a pickle without running anything: classes and functions stay names, calls stay records.

This is the whole virtual machine of the pickle protocols 0 to 5, with every step that would import, call, or
set an attribute replaced by a record of what was asked for:

    GLOBAL, STACK_GLOBAL, INST, EXT*     → Name (never imported)
    REDUCE, NEWOBJ, NEWOBJ_EX, OBJ, INST → Inert (what would be called, and with which arguments)
    BUILD                                → Inert.state
    APPEND(S), ADDITEMS, SETITEM(S)      → Inert.items, Inert.pairs

So the result holds plain builtins, Name, Inert and what the container makes of persistent ids, nothing else.
The C unpickler with its hooks overridden is not used: a memo index of 4 billion makes it touch 64 GB, and
hashing a tuple nested 100,000 deep overflows its stack. Here, memory and time grow with the length of
the pickle alone.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from te_export.checkpoint.inert import Inert, Name
from te_export.checkpoint.pickle_stream import Argument, instructions
from te_export.errors import CheckpointError

__all__ = ["InertPickle", "PersistentLoad", "read_inert_pickle"]

PersistentLoad = Callable[[object], object]


@dataclass(frozen=True)
class InertPickle:
    """What one pickle holds.

    Attributes:
        value: the object it describes.
        names: every class and function it names, in order of first appearance.
        end: position of the byte after it.
    """

    value: object
    names: tuple[Name, ...]
    end: int


def read_inert_pickle(
    data: bytes | mmap.mmap, *, start: int = 0, persistent_load: PersistentLoad
) -> InertPickle:
    """Read one pickle into an inert tree; nothing is imported, called or executed.

    Args:
        data: bytes that hold the pickle; others may follow it.
        start: position of its first byte.
        persistent_load: turns a persistent id into the value that takes its place.

    Raises:
        CheckpointError: the bytes are no well-formed pickle, or exceed the bounds of `pickle_stream`.
    """
    machine = _Machine(persistent_load)
    for name, argument, position in instructions(data, start):
        try:
            if name == "STOP":
                return InertPickle(machine.pop(), tuple(machine.names), position)
            machine.step(name, argument)
        except _DamagedError as error:
            raise CheckpointError(f"pickle byte {position}: {name} {error}; the file is damaged") from error
    raise AssertionError("instructions() ends with STOP or raises")


class _DamagedError(Exception):
    """An instruction that does not fit what is on the stack."""


_PYTHON_2_MODULES: Final = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_PYTHON_2_BUILTINS: Final = {"long": "int", "unicode": "str", "xrange": "range"}
_KEY_TYPES: Final = (str, int, float, bytes, type(None), Name, Inert)
_MAX_PLAIN_KEY_BITS: Final = 63
_MAX_WEAK_KEYS: Final = 2000
_MAX_KEY_PARTS: Final = 16


def _hash_is_weak(key: object) -> bool:
    """Whether keys of one hash can be made up by the thousand: not so for text, hashed with a secret seed."""
    if isinstance(key, tuple):
        return any(isinstance(part, int | float) for part in key)
    return isinstance(key, int) and key.bit_length() > _MAX_PLAIN_KEY_BITS


class _Machine:
    """The stack, marks and memo of a pickle in progress."""

    def __init__(self, persistent_load: PersistentLoad) -> None:
        self.names: dict[Name, None] = {}
        self._persistent_load = persistent_load
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}
        self._weak_keys = 0

    def step(self, name: str, argument: Argument) -> None:
        act = _ACTIONS.get(name)
        if act is None:
            raise _DamagedError("is not used in checkpoints")
        act(self, argument)

    def push(self, value: object) -> None:
        self._stack.append(value)

    def get_memo(self, index: Argument) -> None:
        if not isinstance(index, int) or index not in self._memo:
            raise _DamagedError(f"asks for memo {index!r}, which was not stored")
        self._stack.append(self._memo[index])

    def put_memo(self, index: Argument) -> None:
        self._memo[index if isinstance(index, int) else len(self._memo)] = self.top()

    # The stack

    def top(self) -> object:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise _DamagedError("finds the stack empty")
        return self._stack[-1]

    def pop(self) -> object:
        value = self.top()
        self._stack.pop()
        return value

    def pop_to_mark(self) -> list[object]:
        if not self._marks:
            raise _DamagedError("finds no mark on the stack")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def pop_value_or_mark(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self.pop()

    # Builtin containers

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self._stack.append(tuple(values[::-1]))

    def dict_to_mark(self) -> None:
        values = self.pop_to_mark()
        self._stack.append({})
        self.set_pairs(values)

    def frozenset_to_mark(self) -> None:
        values = self.pop_to_mark()
        self._require_keys(values)
        self._stack.append(frozenset(values))

    def extend(self, values: list[object]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Inert):
            target.items.extend(values)
        else:
            raise _DamagedError(f"appends to a {type(target).__name__}, expected a list")

    def add_to_mark(self) -> None:
        values = self.pop_to_mark()
        target = self.top()
        if isinstance(target, Inert):
            target.items.extend(values)
        elif isinstance(target, set):
            self._require_keys(values)
            target.update(values)
        else:
            raise _DamagedError(f"adds to a {type(target).__name__}, expected a set")

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_pairs([key, value])

    def set_pairs(self, values: list[object]) -> None:
        if len(values) % 2:
            raise _DamagedError("has a key without a value")
        pairs = list(zip(values[::2], values[1::2], strict=True))
        self._require_keys(values[::2])
        target = self.top()
        if isinstance(target, dict):
            target.update(pairs)
        elif isinstance(target, Inert):
            target.pairs.extend(pairs)
        else:
            raise _DamagedError(f"sets items of a {type(target).__name__}, expected a dict")

    def _require_keys(self, keys: list[object]) -> None:
        """Refuse keys whose hashing recurses or takes long (nested or long tuples), or that may all
        collide.
        """
        for key in keys:
            if isinstance(key, tuple) and len(key) > _MAX_KEY_PARTS:
                raise _DamagedError(f"uses a tuple of {len(key)} in a key, expected at most {_MAX_KEY_PARTS}")
            for part in key if isinstance(key, tuple) else (key,):
                if not isinstance(part, _KEY_TYPES):
                    raise _DamagedError(
                        f"uses a {type(part).__name__} in a key, expected text, a number or a class"
                    )
            self._weak_keys += _hash_is_weak(key)
        if self._weak_keys > _MAX_WEAK_KEYS:
            raise _DamagedError(f"is beyond the {_MAX_WEAK_KEYS} tuples of numbers that may be keys")

    # Names, and the calls that are not made

    def name(self, module: object, qualname: object) -> Name:
        if not isinstance(module, str) or not isinstance(qualname, str):
            raise _DamagedError("names a class by something that is not text")
        if module == "__builtin__":
            qualname = _PYTHON_2_BUILTINS.get(qualname, qualname)
        name = Name(_PYTHON_2_MODULES.get(module, module), qualname)
        self.names[name] = None
        return name

    def global_in_argument(self, argument: Argument) -> None:
        module, qualname = argument if isinstance(argument, tuple) else (None, None)
        self._stack.append(self.name(module, qualname))

    def global_on_stack(self) -> None:
        qualname, module = self.pop(), self.pop()
        self._stack.append(self.name(module, qualname))

    def extension(self, argument: Argument) -> None:
        self._stack.append(self.name("copyreg extension", str(argument)))

    def instance_in_argument(self, argument: Argument) -> None:
        arguments = tuple(self.pop_to_mark())
        self.global_in_argument(argument)
        self._stack.append(Inert(self.pop(), arguments))

    def instance_to_mark(self) -> None:
        values = self.pop_to_mark()
        if not values:
            raise _DamagedError("makes an object of no class")
        self._stack.append(Inert(values[0], tuple(values[1:])))

    def call(self) -> None:
        arguments, callee = self.pop(), self.pop()
        if not isinstance(arguments, tuple):
            raise _DamagedError(f"has a {type(arguments).__name__} for arguments, expected a tuple")
        self._stack.append(Inert(callee, arguments))

    def call_with_keywords(self) -> None:
        keywords = self.pop()
        self.call()
        made = self.top()
        if not isinstance(keywords, dict) or not isinstance(made, Inert):
            raise _DamagedError(f"has a {type(keywords).__name__} for keyword arguments, expected a dict")
        made.keywords = keywords

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if not isinstance(target, Inert) or target.state is not None:
            raise _DamagedError(
                f"sets the state of a {type(target).__name__}, expected an object without state"
            )
        target.state = state

    def persistent_id(self) -> None:
        self._stack.append(self._persistent_load(self.pop()))

    def ignore(self, argument: Argument) -> None:
        """PROTO and FRAME tell a reader how to read, not what."""


_Act = Callable[[_Machine, Argument], None]

_LITERALS: Final = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
)
# What is not here (PERSID, the out-of-band buffers) is refused.
_ACTIONS: Final[Mapping[str, _Act]] = {
    **dict.fromkeys(_LITERALS, _Machine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get_memo),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put_memo),
    "MARK": lambda machine, _: machine.mark(),
    "POP": lambda machine, _: machine.pop_value_or_mark(),
    "POP_MARK": lambda machine, _: machine.pop_to_mark().clear(),
    "DUP": lambda machine, _: machine.push(machine.top()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "DICT": lambda machine, _: machine.dict_to_mark(),
    "FROZENSET": lambda machine, _: machine.frozenset_to_mark(),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine.add_to_mark(),
    "SETITEM": lambda machine, _: machine.set_item(),
    "SETITEMS": lambda machine, _: machine.set_pairs(machine.pop_to_mark()),
    "GLOBAL": _Machine.global_in_argument,
    "STACK_GLOBAL": lambda machine, _: machine.global_on_stack(),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _Machine.extension),
    "INST": _Machine.instance_in_argument,
    "OBJ": lambda machine, _: machine.instance_to_mark(),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.call(),
    "NEWOBJ_EX": lambda machine, _: machine.call_with_keywords(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.persistent_id(),
    **dict.fromkeys(("PROTO", "FRAME"), _Machine.ignore),
}

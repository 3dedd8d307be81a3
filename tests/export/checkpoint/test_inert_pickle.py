"""The inert reader agrees with pickle on plain data, and makes records of everything else."""

from __future__ import annotations

import collections
import datetime
import os
import pickle
import pickletools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from te_export.checkpoint.inert import Inert, Name
from te_export.checkpoint.inert_pickle import read_inert_pickle
from te_export.errors import CheckpointError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
KEYS = st.none() | st.booleans() | st.integers() | st.text() | st.tuples(st.text(), st.integers())
PLAIN = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
    ),
    max_leaves=20,
)


def read(data: bytes, start: int = 0):
    return read_inert_pickle(data, start=start, persistent_load=lambda value: ("persistent", value))


@settings(max_examples=150, deadline=None)
@given(value=PLAIN, protocol=st.integers(3, 5), optimized=st.booleans())
def test_plain_values_as_pickle_reads_them(value, protocol, optimized):
    data = pickle.dumps(value, protocol)
    result = read(pickletools.optimize(data) if optimized else data)
    assert result.value == value
    assert result.names == ()


@settings(max_examples=100, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=15,
    ),
    protocol=st.integers(0, 2),
)
def test_plain_values_in_old_protocols(value, protocol):
    assert read(pickle.dumps(value, protocol)).value == value


def test_sets_and_bytearrays():
    value = [{1, "a", None}, frozenset({("x", 1)}), bytearray(b"ab")]
    assert read(pickle.dumps(value, 5)).value == value


def test_several_pickles_in_a_row():
    data = pickle.dumps([1], 2) + pickle.dumps({"a": 2}, 4)
    first = read(data)
    second = read(data, start=first.end)
    assert (first.value, second.value, second.end) == ([1], {"a": 2}, len(data))


def test_objects_are_records():
    when = datetime.timedelta(days=2)
    ordered = collections.OrderedDict([("a", 1)])
    ordered.note = "kept"  # type: ignore[attr-defined]
    result = read(pickle.dumps([when, ordered, os.getcwd], 4))
    made, mapping, function = result.value
    assert isinstance(made, Inert)
    assert made.name == Name("datetime", "timedelta")
    assert made.arguments == (2, 0, 0)
    assert mapping.pairs == [("a", 1)]
    assert mapping.state == {"note": "kept"}
    assert function == Name(os.getcwd.__module__, "getcwd")
    assert set(result.names) == {made.name, Name("collections", "OrderedDict"), function}


def test_python_2_names_are_spelled_as_in_python_3():
    assert read(b"c__builtin__\nset\n.").value == Name("builtins", "set")


def test_self_references_end():
    loop: list[object] = []
    loop.append(loop)
    result = read(pickle.dumps(loop))
    assert result.value[0] is result.value


def test_persistent_ids_go_through_the_caller():
    assert read(b"\x80\x02X\x01\x00\x00\x00kQ.").value == ("persistent", "k")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins a value of 1 bytes, found 0"),
        (b".", "STOP finds the stack empty"),
        (b"\xff.", "no pickle instruction"),
        (b"K", "found 0"),
        (b"K\x01", "found 0"),
        (b"h\x05.", "memo 5, which was not stored"),
        (b"r\xff\xff\xff\xff.", "LONG_BINPUT finds the stack empty"),
        (b"e.", "no mark"),
        (b"K\x01K\x02a.", "appends to a int"),
        (b"](K\x01u.", "key without a value"),
        (b"}]K\x01s.", "uses a list in a key"),
        (b"}K\x01\x85\x85K\x01s.", "uses a tuple in a key"),
        (b"K\x01K\x02R.", "arguments, expected a tuple"),
        (b"K\x01K\x02b.", "sets the state of a int"),
        (b"Iabc\n.", "malformed argument of INT"),
        (b"I12", "line that does not end"),
        (b"X\xff\xff\xff\xffa.", "begins a value of 4294967295 bytes, found 2"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff.", "begins a value of 18446744073709551615 bytes"),
        (b"\x8b\x00\x00\x01\x00" + b"a" * 65536 + b".", "an integer of 65536 bytes"),
        (b"\x97.", "NEXT_BUFFER is not used"),
        (b"Pid\n.", "PERSID is not used"),
        (b"S'a\n.", "without quotes"),
        (b"(o.", "object of no class"),
    ],
)
def test_malformed_pickles_say_where(data, message):
    with pytest.raises(CheckpointError, match="pickle byte") as caught:
        read(data)
    assert message in str(caught.value)


def test_a_memo_index_of_four_billion_costs_nothing():
    assert read(b"Nr\xff\xff\xff\xff.").value is None


def test_deeply_nested_tuples_are_dropped_again():
    value = read(b"N" + b"\x85" * 300_000 + b".").value
    assert isinstance(value, tuple)
    del value


def test_too_many_tuples_of_numbers_as_keys():
    # hash(-1) == hash(-2), so tuples of them collide; two thousand are borne, not a million
    keys = [tuple(-1 - (index >> bit & 1) for bit in range(12)) for index in range(2001)]
    with pytest.raises(CheckpointError, match="beyond the 2000"):
        read(pickle.dumps(dict.fromkeys(keys), 4))

from __future__ import annotations

import json
from typing import Literal, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from te_runtime.strict_json import StrictJsonError, decode, encode


class Inner(NamedTuple):
    name: str
    size: int


class Outer(NamedTuple):
    kind: Literal["a", "b"]
    ratio: float | None
    flag: bool
    inner: Inner
    many: tuple[Inner, ...]
    config: dict[str, bool | int | float | str | tuple[int, ...]]


GOOD = Outer(
    "a", 0.5, True, Inner("n", 1), (Inner("m", 2),), {"k": (1, 2), "s": "t", "f": 1.5, "b": False, "i": 7}
)


def changed(**values: object) -> str:
    return json.dumps({**json.loads(encode(GOOD)), **values})


def test_what_is_written_is_read_back() -> None:
    assert decode(encode(GOOD), Outer) == GOOD
    assert encode(decode(encode(GOOD), Outer)) == encode(GOOD)


@given(
    ratio=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    names=st.lists(st.text(st.characters(categories=["L", "N", "P"]), max_size=5), max_size=4),
    config=st.dictionaries(
        st.text(st.characters(categories=["L"]), max_size=5),
        st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.just(()),
    ),
)
@settings(max_examples=50, deadline=None)
def test_any_printable_value_is_read_back(
    ratio: float | None, names: list[str], config: dict[str, bool]
) -> None:
    value = Outer("b", ratio, False, Inner("x", 3), tuple(Inner(name, 1) for name in names), config)
    assert decode(encode(value), Outer) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "top level: expected object, found array"),
        ("null", "found null"),
        (changed(kind="c"), "kind: expected 'a' or 'b', found string 'c'"),
        (changed(kind=None), "kind"),
        (changed(ratio="1"), "ratio: expected number, found string '1'"),
        (changed(ratio=True), "ratio: expected number, found boolean"),
        (changed(flag=1), "flag: expected boolean, found integer 1"),
        (changed(inner={"name": "n"}), "inner: key 'size' is missing"),
        (changed(inner={"name": "n", "size": 1.0}), "inner.size: expected integer, found number 1.0"),
        (changed(inner={"name": "n", "size": True}), "inner.size: expected integer, found boolean"),
        (changed(inner={"name": "n", "size": 1, "x": 2}), "inner: unknown key 'x'; known keys: name, size"),
        (changed(many={}), "many: expected array, found object"),
        (changed(many=[{"name": "n", "size": 1}, 3]), "many[1]: expected object, found integer 3"),
        (changed(config={"k": None}), "config.k"),
        (changed(config={"k": [1, "2"]}), "config.k[1]: expected integer, found string '2'"),
        (changed(config=[]), "config: expected object, found array"),
        (encode(GOOD).replace("0.5", "NaN"), "NaN is not allowed"),
        (encode(GOOD).replace("0.5", "-Infinity"), "-Infinity is not allowed"),
        (encode(GOOD).replace("0.5", "1e999"), "ratio: expected a number that float64 can hold"),
        (encode(GOOD).replace("0.5", "1" + "0" * 400), "ratio: expected a number that float64 can hold"),
        (encode(GOOD).replace("0.5", "1" * 5000), "not JSON"),
        (
            changed(inner={"name": "n", "size": 10**400}),
            "inner.size: expected an integer that 64 bits can hold",
        ),
        (changed(config={"k": [-(10**400)]}), "config.k[0]: expected an integer that 64 bits can hold"),
        (encode(GOOD).replace('"flag"', '"kind": "a", "flag"'), "key 'kind' stands twice"),
        (encode(GOOD) + "{}", "not JSON"),
        ("[" * 200_000, "nested too deeply"),
        ('{"kind":' * 100_000, "nested too deeply"),
        (changed(inner={"name": "\x1b[31m", "size": 1}), "inner.name"),
        (changed(inner={"name": "\ud800", "size": 1}), "cannot be printed"),
        (changed(config={"a\n": 1}), "cannot be printed"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(StrictJsonError) as caught:
        decode(text, Outer)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


class Grown(NamedTuple):
    name: str
    later: Inner | None = None


def test_a_field_with_a_default_may_be_missing_and_is_checked_where_it_is_there() -> None:
    assert decode('{"name": "n"}', Grown) == Grown("n")
    assert decode('{"name": "n", "later": null}', Grown) == Grown("n")
    assert decode(encode(Grown("n", Inner("m", 1))), Grown) == Grown("n", Inner("m", 1))
    for text, message in (
        ('{"later": null}', "key 'name' is missing"),
        ('{"name": "n", "later": {"name": "m"}}', "later: key 'size' is missing"),
        ('{"name": "n", "more": 1}', "unknown key 'more'"),
    ):
        with pytest.raises(StrictJsonError, match=message):
            decode(text, Grown)


def test_only_named_tuples_are_written() -> None:
    with pytest.raises(TypeError):
        encode(Outer)
    with pytest.raises(ValueError, match="JSON"):
        encode(Outer("a", float("nan"), True, Inner("n", 1), (), {}))

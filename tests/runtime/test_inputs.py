from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from te_runtime.errors import InputError
from te_runtime.inputs import prepare_inputs, shown_shape
from te_runtime.manifest import TensorSpec

X = TensorSpec("x", "float32", ("batch", 4))
Z = TensorSpec("z", "int64", ("batch", "length"))
Y = TensorSpec("y", "int64", ("batch", "length"))


def rows(count: int, dtype: object = np.float32) -> np.ndarray:
    return np.arange(count * 4).reshape(count, 4).astype(dtype)


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, np.int8, np.uint8, np.int64, np.uint64, ">f4", ">f8"]
)
def test_numbers_are_cast_to_float(dtype: object) -> None:
    feeds, count = prepare_inputs(rows(3, dtype), [X])
    assert count == 3
    assert feeds["x"].dtype == np.float32
    np.testing.assert_array_equal(feeds["x"], rows(3))


@pytest.mark.parametrize("dtype", [bool, complex, object, "U3", "S3", "M8[s]", [("a", "f4")]])
def test_other_kinds_are_refused(dtype: object) -> None:
    with pytest.raises(InputError, match=r"expected floats or integers \(float32\)"):
        prepare_inputs(np.zeros((2, 4), dtype=dtype), [X])


@given(
    count=st.integers(0, 5),
    layout=st.sampled_from(["C", "F", "reversed", "strided", "broadcast"]),
    dtype=st.sampled_from([np.float32, np.float64, np.int16]),
)
@settings(max_examples=60, deadline=None)
def test_any_memory_layout_gives_the_same_contiguous_values(count: int, layout: str, dtype: type) -> None:
    plain = rows(count, dtype)
    array = {
        "C": lambda: plain,
        "F": lambda: np.asfortranarray(plain),
        "reversed": lambda: plain[::-1][::-1],
        "strided": lambda: np.repeat(plain, 2, axis=1)[:, ::2],
        "broadcast": lambda: np.broadcast_to(plain[:1], plain.shape) if count else plain,
    }[layout]()
    feeds, found = prepare_inputs(array, [X])
    assert found == count
    assert feeds["x"].flags.c_contiguous
    np.testing.assert_array_equal(feeds["x"], array.astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4,), "got shape (4,), expected (batch, 4): for one row pass x[None, :]"),
        ((), "got shape (), expected (batch, 4)"),
        ((2, 5), "got shape (2, 5), expected (batch, 4)"),
        ((4, 2), "got shape (4, 2), expected (batch, 4)"),
        ((1, 2, 4), "got shape (1, 2, 4), expected (batch, 4)"),
        ((0,), "for one row pass x[None, :]"),
        ((0, 5), "got shape (0, 5)"),
    ],
)
def test_another_shape_is_refused_with_the_one_it_needs(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError) as caught:
        prepare_inputs(np.zeros(shape, dtype=np.float32), [X])
    assert message in str(caught.value)
    assert "'x'" in str(caught.value)


def test_nan_and_infinity_pass() -> None:
    feeds, _ = prepare_inputs(np.array([[np.nan, np.inf, -np.inf, 0]]), [X])
    np.testing.assert_array_equal(feeds["x"], np.array([[np.nan, np.inf, -np.inf, 0]], dtype=np.float32))


def test_a_number_that_would_turn_into_infinity_is_refused() -> None:
    with pytest.raises(InputError, match="a float64 value is too large for float32"):
        prepare_inputs(np.full((1, 4), 1e39), [X])


def test_integers_must_fit() -> None:
    spec = TensorSpec("x", "int8", ("batch", 1))
    feeds, _ = prepare_inputs(np.array([[127], [-128]]), [spec])
    assert feeds["x"].dtype == np.int8
    with pytest.raises(InputError, match="values from 0 to 128 do not fit int8"):
        prepare_inputs(np.array([[0], [128]]), [spec])
    with pytest.raises(InputError, match=r"got float64, expected integers \(int8\)"):
        prepare_inputs(np.array([[1.0]]), [spec])
    assert prepare_inputs(np.zeros((0, 1), dtype=np.int64), [spec])[1] == 0


def test_bools_stay_bools() -> None:
    spec = TensorSpec("x", "bool", ("batch", 1))
    assert prepare_inputs(np.array([[True]]), [spec])[0]["x"].dtype == np.bool_
    with pytest.raises(InputError, match=r"expected bools \(bool\)"):
        prepare_inputs(np.array([[1]]), [spec])


@pytest.mark.parametrize("wrong", [[[1.0] * 4], 3.0, None, "x", np.float32(1)])
def test_what_is_no_array_is_refused_with_advice(wrong: object) -> None:
    with pytest.raises(InputError, match=r"expected a numpy array: pass numpy\.asarray"):
        prepare_inputs(wrong, [X])


def test_masked_arrays_are_refused() -> None:
    with pytest.raises(InputError, match="masked values would be lost"):
        prepare_inputs(np.ma.masked_array(rows(1)), [X])


def test_several_inputs_are_named() -> None:
    both = {"z": np.zeros((2, 3), dtype=np.int64), "x": rows(2)}
    feeds, count = prepare_inputs(both, [X, Z])
    assert list(feeds) == ["x", "z"]
    assert count == 2
    with pytest.raises(InputError, match=r"2 inputs \(x, z\): pass a dict"):
        prepare_inputs(rows(2), [X, Z])
    with pytest.raises(InputError, match="missing z; unknown Z; expected exactly x, z"):
        prepare_inputs({"x": rows(2), "Z": rows(2)}, [X, Z])
    with pytest.raises(InputError, match="unknown y; expected exactly x"):
        prepare_inputs({"x": rows(2), "y": rows(2)}, [X])
    with pytest.raises(InputError, match="missing x; expected exactly x"):
        prepare_inputs({}, [X])


def test_one_axis_has_one_length_in_every_input() -> None:
    with pytest.raises(InputError, match="axis 'batch' is 2 in input 'x' and 3 in input 'z'"):
        prepare_inputs({"x": rows(2), "z": np.zeros((3, 1), dtype=np.int64)}, [X, Z])
    with pytest.raises(InputError, match="axis 'length' is 1 in input 'z' and 2 in input 'y'"):
        prepare_inputs({"z": np.zeros((3, 1), dtype=int), "y": np.zeros((3, 2), dtype=int)}, [Z, Y])
    with pytest.raises(InputError, match="axis 'length' is empty"):
        prepare_inputs({"z": np.zeros((3, 0), dtype=int)}, [Z])


def test_bfloat16_cannot_be_fed_yet() -> None:
    with pytest.raises(InputError, match="bfloat16"):
        prepare_inputs(rows(1), [TensorSpec("x", "bfloat16", ("batch", 4))])


def test_shapes_are_shown_as_python_writes_them() -> None:
    assert shown_shape(()) == "()"
    assert shown_shape((3,)) == "(3,)"
    assert shown_shape(("batch", 784)) == "(batch, 784)"

"""Rows of several inputs stay together: every slice takes the same rows of each, in C order."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from te_export.models.input_rows import InputRows, join_rows


def three(rows: int = 6) -> InputRows:
    """Floats of rank 3, integers of rank 1, and bools of rank 2; row i holds what only row i holds."""
    numbers = np.arange(rows)
    return InputRows(
        {
            "x": np.arange(rows * 6, dtype=np.float32).reshape(rows, 2, 3),
            "ids": 100 + numbers,
            "is_new": (numbers % 3 == 0)[:, None],
        }
    )


def assert_rows(found: InputRows, whole: InputRows, indices: list[int]) -> None:
    assert list(found.arrays) == list(whole.arrays)
    assert len(found) == len(indices)
    for name, array in found.arrays.items():
        assert array.dtype == whole.arrays[name].dtype
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, np.stack([whole.arrays[name][i] for i in indices]))


@pytest.mark.parametrize(
    ("rows", "indices"),
    [
        (slice(None), [0, 1, 2, 3, 4, 5]),
        (slice(2, 4), [2, 3]),
        (slice(1, None, 2), [1, 3, 5]),
        (slice(None, None, -2), [5, 3, 1]),
        (slice(4, 99), [4, 5]),
        ([3, 0, 3], [3, 0, 3]),
        ([5], [5]),
        (np.array([4, 1]), [4, 1]),
        (np.array([-1, 0], np.int32), [5, 0]),
        (np.arange(9) % 6, [0, 1, 2, 3, 4, 5, 0, 1, 2]),
    ],
)
def test_rows_are_taken_of_every_input_alike(
    rows: slice | list[int] | np.ndarray, indices: list[int]
) -> None:
    assert_rows(three()[rows], three(), indices)


def test_no_rows_keep_shapes_and_dtypes() -> None:
    for none in (three()[:0], three()[np.array([], np.int64)]):
        assert len(none) == 0
        assert {name: (array.shape, array.dtype) for name, array in none.arrays.items()} == {
            "x": ((0, 2, 3), np.dtype(np.float32)),
            "ids": ((0,), np.dtype(np.int64)),
            "is_new": ((0, 1), np.dtype(bool)),
        }


@pytest.mark.parametrize("short", ["x", "ids", "is_new"])
def test_inputs_of_different_lengths_are_refused_with_their_shapes(short: str) -> None:
    arrays = dict(three().arrays)
    arrays[short] = arrays[short][:-1]

    with pytest.raises(ValueError, match="expected one number of rows") as caught:
        InputRows(arrays)

    for name, array in arrays.items():
        assert f"'{name}': {array.shape}" in str(caught.value)


def test_no_inputs_are_no_rows() -> None:
    with pytest.raises(ValueError, match="expected one number of rows"):
        InputRows({})


def test_a_session_is_fed_the_inputs_that_it_reads_and_no_other() -> None:
    rows = three()

    assert list(rows.feeds(["ids", "x"])) == ["ids", "x"]
    assert rows.feeds(["ids"])["ids"] is rows.arrays["ids"]
    assert rows.feeds([]) == {}
    with pytest.raises(KeyError, match="nobody"):
        rows.feeds(["x", "nobody"])


def test_forward_takes_copies_of_the_inputs_in_order() -> None:
    rows = three()
    x, ids, is_new = rows.tensors()

    assert (x.dtype, ids.dtype, is_new.dtype) == (torch.float32, torch.int64, torch.bool)
    assert (x.shape, ids.shape, is_new.shape) == ((6, 2, 3), (6,), (6, 1))
    ids[0] = 7  # as a module may that writes to its input
    assert rows.arrays["ids"][0] != 7


def test_arrays_that_may_not_be_written_to_are_copied() -> None:
    x = np.arange(6, dtype=np.float32)
    x.flags.writeable = False
    rows = InputRows({"x": x})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tensor,) = rows.tensors()
    tensor += 1

    assert x.tolist() == [0, 1, 2, 3, 4, 5]
    assert tensor.tolist() == [1, 2, 3, 4, 5, 6]


def test_joined_rows_stand_one_after_the_other() -> None:
    whole = three()

    assert_rows(join_rows([whole[4:], whole[:1], whole[[2]]]), whole, [4, 5, 0, 2])
    assert_rows(join_rows([whole]), whole, list(range(6)))


def test_floats_are_told_from_integers_and_bools() -> None:
    rows = three()

    assert rows.has_floats
    assert not InputRows(rows.feeds(["ids", "is_new"])).has_floats

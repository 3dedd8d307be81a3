"""Example inputs in every form, what they are taken as, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from te_export.errors import UsageError
from te_export.modules.example_inputs import ExampleInputs, input_dtype, read_example_inputs

ROWS = 3
X = np.arange(ROWS * 2, dtype=np.float32).reshape(ROWS, 2)
IDS = np.arange(ROWS)


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Two(nn.Module):
    def forward(self, users: Tensor, items: Tensor, scale: float = 1.0) -> Tensor:
        return users + items


class ByKeyword(nn.Module):
    def forward(self, *, users: Tensor, items: Tensor) -> Tensor:
        return users + items


class Catching(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return tensors[0]


def require(found: ExampleInputs, style: str, **arrays: Any) -> None:
    assert found.style == style
    assert found.names == tuple(arrays)
    for name, array in arrays.items():
        assert found.rows.arrays[name].dtype == array.dtype
        assert np.array_equal(found.rows.arrays[name], array)


@pytest.mark.parametrize("given", [X, torch.from_numpy(X), [X], (torch.from_numpy(X),), {"x": X}])
def test_one_input_is_named_as_forward_names_it(given: Any) -> None:
    require(read_example_inputs(given, One()), "positional", x=X)


def test_several_are_named_in_forwards_order() -> None:
    require(read_example_inputs((X, IDS), Two()), "positional", users=X, items=IDS)


def test_names_are_made_where_forward_has_none() -> None:
    require(read_example_inputs((X, IDS), Catching()), "positional", input_0=X, input_1=IDS)


def test_a_dict_of_forwards_parameters_is_given_by_keyword() -> None:
    found = read_example_inputs({"items": IDS, "users": X}, Two())

    require(found, "keywords", items=IDS, users=X)
    positional, named = found.arguments(found.rows.tensors())
    assert (positional, list(named)) == ((), ["items", "users"])


def test_a_dict_of_other_names_is_one_argument() -> None:
    found = read_example_inputs({"age": X, "city": IDS}, One())

    require(found, "mapping", age=X, city=IDS)
    ((named,), keywords) = found.arguments(found.rows.tensors())
    assert isinstance(named, dict)
    assert (list(named), keywords, found.leading) == (["age", "city"], {}, 1)


def test_a_dict_of_one_other_name_is_one_argument() -> None:
    require(read_example_inputs({"age": X}, One()), "mapping", age=X)


def test_inputs_that_forward_takes_by_keyword_alone() -> None:
    require(read_example_inputs({"items": IDS, "users": X}, ByKeyword()), "keywords", items=IDS, users=X)


@pytest.mark.parametrize("as_text", [False, True])
def test_a_file_of_one_array_is_forwards_input_whatever_its_name(tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "rows.npz"
    np.savez(path, arr_0=X)

    require(read_example_inputs(str(path) if as_text else path, One()), "positional", x=X)


class TaskFirst(nn.Module):
    def forward(self, task: str, rows: Tensor) -> Tensor:
        return rows


def test_a_file_of_one_array_is_the_input_of_its_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", rows=X)

    require(read_example_inputs(tmp_path / "rows.npz", TaskFirst()), "keywords", rows=X)


class AnyFeatures(nn.Module):
    def forward(self, **features: Tensor) -> Tensor:
        return features["users"]


class OneAndMore(nn.Module):
    def forward(self, users: Tensor, scale: float = 1.0, **features: Tensor) -> Tensor:
        return users * scale


class Passing(nn.Module):
    def forward(self, *inputs: Tensor, **features: Tensor) -> Tensor:
        return inputs[0]


@pytest.mark.parametrize(
    ("module", "style"), [(AnyFeatures(), "keywords"), (OneAndMore(), "keywords"), (Passing(), "mapping")]
)
def test_names_that_forward_catches(module: nn.Module, style: str) -> None:
    require(read_example_inputs({"users": X, "items": IDS}, module), style, users=X, items=IDS)


def test_one_dict_beside_keywords_that_are_caught_stays_one() -> None:
    require(read_example_inputs({"age": X, "items": IDS}, OneAndMore()), "mapping", age=X, items=IDS)


def test_a_file_of_several_arrays_is_a_dict(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", users=X, items=IDS)

    require(read_example_inputs(tmp_path / "rows.npz", Two()), "keywords", users=X, items=IDS)


@pytest.mark.parametrize(
    ("given", "taken", "is_told"),
    [
        (X.astype(np.float64), "float32", False),
        (X.astype(np.float16), "float32", True),
        (torch.from_numpy(X).bfloat16(), "float32", True),
        (IDS.astype(np.int16), "int64", True),
        (IDS.astype(np.uint32), "int64", True),
        (IDS.astype(np.int8), "int8", False),
        (IDS.astype(np.uint8), "uint8", False),
        (IDS.astype(np.int32), "int32", False),
        (IDS > 1, "bool", False),
    ],
    ids=["float64", "float16", "bfloat16", "int16", "uint32", "int8", "uint8", "int32", "bool"],
)
def test_dtypes_that_a_bundle_reads(given: Any, taken: str, is_told: bool) -> None:
    found = read_example_inputs(given, One())

    assert input_dtype(found.rows.arrays["x"]) == taken
    assert [f"'x' is taken as {taken}" in note for note in found.notes] == [True] * is_told


def test_tensors_that_need_gradients_or_lie_in_strides() -> None:
    tensor = torch.from_numpy(X).t().contiguous().t().requires_grad_()

    array = read_example_inputs(tensor, One()).rows.arrays["x"]

    assert np.array_equal(array, X)
    assert array.flags.c_contiguous


def test_the_rows_are_a_copy() -> None:
    given = X.copy()
    found = read_example_inputs(given, One())
    given[:] = 7

    assert np.array_equal(found.rows.arrays["x"], X)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "got none, expected at least one array"),
        ([], "got none, expected at least one array"),
        (np.array(1.0), "has no axes, expected the batch axis first. If it tells forward which task to answer, leave"),
        (1.0, "'users': got the float 1.0, expected an array with the batch axis first. If it tells forward"),
        (np.float32(1.0), r"'users': got the float32 \S*1\.0\)?, expected an array with the batch axis first"),
        ((X, "click"), "'items': got the str 'click', expected an array with the batch axis first. If it tells forward"),
        (X[:0], "have no rows"),
        ((X, IDS[:2]), r"different numbers of rows \(users: 3, items: 2\)"),
        ({"users": X, "items": IDS[:1]}, r"different numbers of rows \(users: 3, items: 1\)"),
        (np.array(["a", "b"]), "got <U1, expected numbers or bools"),
        (np.array([1j, 2j]), "got complex128, expected numbers or bools"),
        (np.array([None, 1], dtype=object), "got object, expected numbers or bools"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), "got datetime64"),
        (X * np.float32("nan"), "holds NaN or infinity"),
        (X + np.float32("inf"), "holds NaN or infinity"),
        ([[1.0, 2.0]], "'users': got list, expected a tensor or a numpy array"),
        ({"users": X, "items": None}, "'items': got NoneType"),
        (torch.from_numpy(X).to_sparse(), "sparse"),
    ],
    ids=[
        "an empty dict", "an empty list", "no axes", "a number", "a number of numpy", "a text", "no rows",
        "uneven rows", "uneven rows by name", "texts", "complex",
        "objects", "dates", "NaN", "infinity", "lists", "None", "sparse",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_what_is_no_example_is_refused(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_example_inputs(given, Two())


def test_a_double_too_large_for_float32_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'x'.*float32"):
        read_example_inputs(np.full((ROWS, 2), 1e300), One())


def test_a_whole_number_too_large_for_int64_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'x'.*int64"):
        read_example_inputs(np.full(ROWS, 2**63, np.uint64), One())


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 no zip", b"\x93NUMPY"])
def test_a_file_that_is_none_is_refused_with_what_writes_one(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "rows.npz"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UsageError, match=r"rows\.npz.*numpy\.savez\("):
        read_example_inputs(path, One())


def test_a_file_of_pickled_objects_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.write_text, (tmp_path / "ran", "x"))

    np.savez(tmp_path / "rows.npz", x=np.array([Runs()], dtype=object))

    with pytest.raises(UsageError, match=r"rows\.npz"):
        read_example_inputs(tmp_path / "rows.npz", One())
    assert not (tmp_path / "ran").exists()

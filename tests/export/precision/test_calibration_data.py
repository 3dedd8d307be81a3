"""Calibration data is the user's own file: whatever is in it gives rows that can be used, or one plain error."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from te_export.errors import UsageError
from te_export.models.exportable import ExportableModel, ModelInput
from te_export.precision import calibration_data
from te_export.precision.calibration_data import FEWEST_ROWS, CalibrationData, read_calibration_data

ROWS, WIDTH = 40, 20  # tasks of SMALL: task_0 with 4 outputs, task_1 with 1, task_2 with 4

Save = Callable[..., Path]
Read = Callable[..., CalibrationData]


def rows(count: int = ROWS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def classes(count: int = ROWS) -> np.ndarray:
    return np.arange(count) // 2 % 4


def labels(task: int, values: object) -> dict[str, object]:
    return {f"labels.task_{task}": values}


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """`save(**arrays)`: an .npz file of them, with good rows where no x is given."""

    def save_arrays(**arrays: object) -> Path:
        path = tmp_path / "data.npz"
        np.savez(path, **{"x": rows(), **arrays})
        return path

    return save_arrays


@pytest.fixture
def read(save: Save, exportable: ExportableModel) -> Read:
    """`read(**arrays)`: what is read of a file of them."""
    return lambda **arrays: read_calibration_data(save(**arrays), exportable)


def refusal(path: Path, model: ExportableModel) -> str:
    with pytest.raises(UsageError) as caught:
        read_calibration_data(path, model)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.startswith(str(path))
    return message


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_no_file_and_things_that_are_no_file(tmp_path: Path, exportable: ExportableModel) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    assert "is a folder, expected an .npz file" in refusal(tmp_path, exportable)
    for name in ("missing.npz", "pipe", "loop", "n" * 300, "missing/x.npz"):
        assert "no such file" in refusal(tmp_path / name, exportable)
    with pytest.raises(UsageError, match="no such file"):
        read_calibration_data("zero\0byte", exportable)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 not an archive",
        b"a,b,c\n1,2,3\n",
        pickle.dumps([1.0] * 100),
        header((40, 20)) + b"\0" * 3200,  # what numpy.save writes
    ],
)
def test_files_of_other_kinds(tmp_path: Path, exportable: ExportableModel, data: bytes) -> None:
    (tmp_path / "data.npz").write_bytes(data)
    message = refusal(tmp_path / "data.npz", exportable)
    assert "numpy.savez(file, x=rows)" in message


@pytest.mark.parametrize(
    "member",
    [
        header((40, 20)) + b"\0" * 3199,
        header((10**9, 20)),
        header((-1, 20)),
        header((40,), "|O") + b"\0" * 320,
        b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000,
        b"x",
    ],
)
def test_damaged_arrays(tmp_path: Path, exportable: ExportableModel, member: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x.npy", member)
    assert "cannot be read" in refusal(tmp_path / "data.npz", exportable)


def test_pickled_objects_are_never_run(save: Save, tmp_path: Path, exportable: ExportableModel) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "owned",))

    message = refusal(save(x=np.array([Evil()] * ROWS, dtype=object)), exportable)
    assert "array 'x': it holds pickled Python objects, expected plain numbers" in message
    assert not (tmp_path / "owned").exists()


def test_an_archive_larger_than_the_limit(
    save: Save, exportable: ExportableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_data, "LARGEST_BYTES", 1000)
    message = refusal(save(), exportable)
    assert re.search(r"its arrays take \d+ bytes, expected at most 1000", message)


def test_an_archive_that_says_it_is_larger_than_memory(tmp_path: Path, exportable: ExportableModel) -> None:
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x.npy", header((2**33, WIDTH)))
        archive.getinfo("x.npy").file_size = 2**33 * WIDTH * 4 + 128
    assert "expected at most 4294967296" in refusal(tmp_path / "data.npz", exportable)


def test_damage_at_random(tmp_path: Path, exportable: ExportableModel) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=rows(), **labels(0, classes()))
    sound = path.read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        data = bytearray(sound)
        for _ in range(rng.choice([1, 3, 20])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            found = read_calibration_data(path, exportable)
        except UsageError:
            continue
        assert found.x.arrays["x"].shape == (ROWS, WIDTH)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("X", "array 'x' is missing; array 'X' is unknown"),
        ("arr_0", "array 'x' is missing; array 'arr_0' is unknown"),
    ],
)
def test_the_input_under_another_name(
    tmp_path: Path, exportable: ExportableModel, name: str, message: str
) -> None:
    np.savez(tmp_path / "data.npz", **{name: rows()})
    found = refusal(tmp_path / "data.npz", exportable)
    assert message in found
    assert "Expected 'x' for the rows" in found


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("labels.task_9", "labels.task_0"),
        ("task_0", None),
        ("labels", None),
        ("Labels.task_1", "labels.task_1"),
    ],
)
def test_unknown_arrays(save: Save, exportable: ExportableModel, name: str, near: str | None) -> None:
    message = refusal(save(**{name: classes()}), exportable)
    assert f"array {name!r} is unknown" in message
    assert "labels.task_0, labels.task_1, labels.task_2" in message
    assert near is None or "did you mean 'labels.task_" in message


def test_an_empty_archive(tmp_path: Path, exportable: ExportableModel) -> None:
    np.savez(tmp_path / "data.npz")
    assert "array 'x' is missing. Expected 'x'" in refusal(tmp_path / "data.npz", exportable)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (rows()[:, :5], "got shape (40, 5), expected (batch, 20)"),
        (rows()[0], "got shape (20,), expected (batch, 20)"),
        (rows()[None], "got shape (1, 40, 20), expected (batch, 20)"),
        (np.float32(1.0), "got shape (), expected (batch, 20)"),
        (rows()[:0], "got 0 rows, expected at least 32"),
        (rows()[: FEWEST_ROWS - 1], "got 31 rows, expected at least 32"),
        (rows() > 0, "got bool, expected floats or integers"),
        (rows().astype(np.complex64), "got complex64, expected floats"),
        (rows().astype(str), "expected floats or integers"),
        (rows().astype("V4"), "expected floats or integers"),
        (np.zeros((ROWS, WIDTH), "datetime64[s]"), "got datetime64[s], expected floats"),
        (rows().astype(np.float64) * 1e39, "a float64 value is too large for float32"),
    ],
)
def test_rows_that_do_not_fit(save: Save, exportable: ExportableModel, x: np.ndarray, message: str) -> None:
    found = refusal(save(x=x), exportable)
    assert message in found
    assert "'x'" in found
    assert "at least 32" in found or "was trained on them, float32 of shape (rows, 20)" in found


@pytest.fixture
def several(exportable: ExportableModel) -> ExportableModel:
    """A model of three inputs, one of them called as the axis of rows is."""
    inputs = (
        ModelInput("batch", "float32", (2, 3)),
        ModelInput("ids", "int64", (), below=9),
        ModelInput("is_new", "bool", (1,)),
    )
    return dataclasses.replace(exportable, inputs=inputs)


def three(**changes: np.ndarray) -> dict[str, np.ndarray]:
    ids = np.arange(ROWS, dtype=np.int32)
    arrays = {"batch": rows()[:, :6].reshape(ROWS, 2, 3), "ids": ids, "is_new": ids[:, None] > 7}
    return {**arrays, **changes}


def save_exactly(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, **arrays)
    return path


def test_rows_of_several_inputs_are_cast_and_halved_together(
    tmp_path: Path, several: ExportableModel
) -> None:
    found = read_calibration_data(save_exactly(tmp_path / "data.npz", three()), several)
    assert {name: array.dtype.name for name, array in found.x.arrays.items()} == {
        "batch": "float32",
        "ids": "int64",
        "is_new": "bool",
    }
    assert len(found.x) == ROWS
    for half, start in ((found.calibration_rows, 0), (found.judged_rows, 1)):
        for name, array in three().items():
            np.testing.assert_array_equal(half.arrays[name], array[start::2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": rows()}, "input 'batch': got shape (40, 20), expected (batch, 2, 3)"),
        ({"ids": np.arange(ROWS)[:, None]}, "input 'ids': got shape (40, 1), expected (batch,)"),
        ({"ids": np.arange(39)}, "axis 'batch' is 40 in input 'batch' and 39 in input 'ids'"),
        ({"ids": np.ones(ROWS)}, "input 'ids': got float64, expected integers"),
        ({"is_new": np.ones((ROWS, 1), np.int8)}, "input 'is_new': got int8, expected bools"),
    ],
)
def test_one_input_of_several_that_does_not_fit(
    tmp_path: Path, several: ExportableModel, changes: dict[str, np.ndarray], message: str
) -> None:
    found = refusal(save_exactly(tmp_path / "data.npz", three(**changes)), several)
    assert message in found
    assert (
        "Store the rows as the model was trained on them, 'batch' as float32 of shape (rows, 2, 3), "
        "'ids' as int64 of shape (rows,), 'is_new' as bool of shape (rows, 1)"
    ) in found


def test_an_input_of_several_that_is_missing_or_not_finite(tmp_path: Path, several: ExportableModel) -> None:
    arrays = three()
    del arrays["ids"]
    found = refusal(save_exactly(tmp_path / "data.npz", arrays), several)
    assert "array 'ids' is missing. Expected 'batch', 'ids', 'is_new' for the rows" in found
    wrong = rows()[:, :6].reshape(ROWS, 2, 3)
    wrong[4, 1, 2] = np.inf
    found = refusal(save_exactly(tmp_path / "data.npz", three(batch=wrong)), several)
    assert (
        "array 'batch': 1 of 240 values are NaN or infinite, the first (inf) in row 4, column 1, 2" in found
    )
    (tmp_path / "data.npz").write_bytes(b"")
    assert "numpy.savez(file, **{'batch': …, 'ids': …, 'is_new': …})" in refusal(
        tmp_path / "data.npz", several
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_that_are_not_finite(
    save: Save, exportable: ExportableModel, value: float, dtype: type[np.floating]
) -> None:
    x = rows().astype(dtype)
    x[3, 4] = x[9, 0] = value
    message = refusal(save(x=x), exportable)
    assert "array 'x': 2 of 800 values are NaN or infinite" in message
    assert "in row 3, column 4, counted from 0" in message


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        (0, classes()[:-1], "got labels of 39 rows, expected 40"),
        (0, classes()[:-1, None], "got labels of 39 rows, expected 40"),
        (0, np.zeros((40, 3)), "got shape (40, 3), expected (40,), (40, 1) or (40, 4)"),
        (0, np.zeros((40, 4, 1)), "got shape (40, 4, 1), expected (40,), (40, 1) or (40, 4)"),
        (0, np.int64(1), "got shape (), expected (40,), (40, 1) or (40, 4)"),
        (1, np.zeros((40, 2)), "got shape (40, 2), expected (40,) or (40, 1)"),
        (0, classes() + 1, "got 4 in row 6, expected whole classes from 0 to 3"),
        (0, classes() - 1, "got -1 in row 0, expected whole classes from 0 to 3"),
        (0, np.full(40, 2**64 - 1, np.uint64), "expected whole classes from 0 to 3"),
        (0, np.full(40, 1e300), "got 1e+300 in row 0, expected whole classes"),
        (0, classes() + 0.5, "got 0.5 in row 0, expected whole classes"),
        (
            0,
            np.where(classes() == 3, np.nan, classes()),
            "NaN or infinite, the first (nan) in row 6, column 0",
        ),
        (
            1,
            np.where(classes() == 3, np.inf, classes()),
            "NaN or infinite, the first (inf) in row 6, column 0",
        ),
        (0, classes().astype(str), "expected integers or floats"),
        (0, classes().astype(complex), "got complex128, expected integers or floats"),
        (1, classes() * 1e39, "row 2 is too large for float32"),
        (0, np.eye(4)[classes()], "got only 0 and 1 in shape (40, 4)"),
        (1, np.ones(40), "is 1 in every row with an odd index, and those judge; expected both 0 and 1"),
        (1, np.arange(40) % 2, "is 1 in every row with an odd index"),
        (1, np.full(40, 2.5), "is 2.5 in every row with an odd index, and those judge; expected values that"),
        (1, np.arange(40) * 1e-200, "in every row with an odd index"),
        (0, np.full((40, 4), 0.1), "is 0.1, 0.1, 0.1, 0.1 in every row with an odd index"),
    ],
)
def test_labels_that_do_not_fit(
    save: Save, exportable: ExportableModel, task: int, values: np.ndarray, message: str
) -> None:
    found = refusal(save(**labels(task, values)), exportable)
    assert message in found
    assert f"array 'labels.task_{task}'" in found


@pytest.mark.skipif(
    np.finfo(np.longdouble).max <= np.finfo(np.float64).max, reason="needs a wider longdouble"
)
def test_labels_that_float64_cannot_hold(save: Save, exportable: ExportableModel) -> None:
    values = np.full(40, np.finfo(np.longdouble).max)
    assert "NaN or infinite" in refusal(save(**labels(1, values)), exportable)


def test_memory_that_runs_out_is_told(
    save: Save, exportable: ExportableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starve(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(calibration_data, "prepare_inputs", starve)
    assert "memory ran out" in refusal(save(), exportable)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", "|i1", "|u1", ">i2", "<i8", "<u8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_any_width_are_cast(read: Read, dtype: str, order: str) -> None:
    x = np.array(rows() * 10, dtype=np.float32).clip(0, 100).astype(dtype, order=order)
    found = read(x=x).x.arrays["x"]
    assert found.dtype == np.dtype("=f4")
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, x.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float64, ">i4"])
@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 1)])
def test_classes_in_any_dtype(read: Read, dtype: object, shape: tuple[int, ...]) -> None:
    found = read(**labels(2, classes().astype(dtype).reshape(shape))).labels
    assert list(found) == ["task_2"]
    assert found["task_2"].dtype == np.int64
    np.testing.assert_array_equal(found["task_2"], classes())


@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 1)])
@pytest.mark.parametrize("values", [np.arange(ROWS) / 7, np.arange(ROWS) // 2 % 2 == 1, np.arange(ROWS)])
def test_values_of_a_task_with_one_output(read: Read, values: np.ndarray, shape: tuple[int, ...]) -> None:
    found = read(**labels(1, values.reshape(shape))).labels["task_1"]
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, values.astype(np.float64)[:, None])


def test_values_of_a_task_with_many_outputs(read: Read) -> None:
    values = np.random.default_rng(0).standard_normal((ROWS, 4)).astype(np.float32)
    found = read(**labels(0, values)).labels["task_0"]
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, values)


@given(count=st.integers(FEWEST_ROWS, 70), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_every_row_calibrates_or_judges(
    tmp_path_factory: pytest.TempPathFactory, exportable: ExportableModel, count: int, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "halves.npz"
    np.savez(path, x=rows(count, seed), **labels(0, classes(count)))
    found = read_calibration_data(path, exportable)
    judged, calibrating = (rows.arrays["x"] for rows in (found.judged_rows, found.calibration_rows))
    assert judged.flags.c_contiguous
    assert calibrating.flags.c_contiguous
    np.testing.assert_array_equal(calibrating, rows(count, seed)[0::2])
    np.testing.assert_array_equal(judged, rows(count, seed)[1::2])
    assert len(judged) + len(calibrating) == count
    np.testing.assert_array_equal(found.judged_labels["task_0"], classes(count)[1::2])


def test_tasks_of_the_export_alone_may_have_labels(
    save: Save, make_model: Callable[..., object], load: Callable[..., ExportableModel]
) -> None:
    model = load(make_model().state_dict(), tasks=("task_2",))
    assert "array 'labels.task_0' is unknown" in refusal(save(**labels(0, classes())), model)
    assert list(read_calibration_data(save(**labels(2, classes())), model).labels) == ["task_2"]

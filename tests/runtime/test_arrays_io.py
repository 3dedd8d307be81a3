from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from te_runtime.arrays_io import check_output_path, default_output_path, read_inputs, write_predictions
from te_runtime.errors import InputError
from te_runtime.manifest import TensorSpec
from te_runtime.prediction import Prediction

X = TensorSpec("x", "float32", ("batch", 2))
Z = TensorSpec("z", "float32", ("batch", 2))
ROWS = np.arange(4.0).reshape(2, 2)
PREDICTIONS = {"a": Prediction(ROWS, None), "file": Prediction(ROWS + 1, ROWS + 2)}


def test_one_array_feeds_the_only_input_whatever_its_name(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROWS)
    np.savez(tmp_path / "b.npz", anything=ROWS)
    (tmp_path / "a.npy").rename(tmp_path / "named.wrong")
    for name in ("named.wrong", "b.npz"):
        found = read_inputs(tmp_path / name, [X])
        assert list(found) == ["x"]
        np.testing.assert_array_equal(found["x"], ROWS)


def test_several_arrays_keep_their_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", x=ROWS, z=ROWS + 1)
    assert sorted(read_inputs(tmp_path / "b.npz", [X, Z])) == ["x", "z"]
    assert sorted(read_inputs(tmp_path / "b.npz", [X])) == ["x", "z"]


def test_files_that_are_no_inputs_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROWS)
    (tmp_path / "a.csv").write_text("1,2\n")
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match="the model has inputs x, z"):
        read_inputs(tmp_path / "a.npy", [X, Z])
    for name, message in (
        ("a.csv", "neither"),
        ("empty", "neither"),
        ("no", "no such file"),
        ("", "directory"),
    ):
        with pytest.raises(InputError, match=message):
            read_inputs(tmp_path / name, [X])


def test_predictions_are_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    write_predictions(path, PREDICTIONS)
    with np.load(path, allow_pickle=False) as found:
        assert sorted(found) == ["a.prediction", "file.prediction", "file.routing_weights"]
        np.testing.assert_array_equal(found["file.routing_weights"], ROWS + 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.npz"]


def test_the_same_predictions_are_the_same_bytes(tmp_path: Path) -> None:
    write_predictions(tmp_path / "a.npz", PREDICTIONS)
    write_predictions(tmp_path / "b.npz", PREDICTIONS)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    path.write_text("mine")
    with pytest.raises(InputError, match="--force"):
        write_predictions(path, PREDICTIONS)
    assert path.read_text() == "mine"
    write_predictions(path, PREDICTIONS, force=True)
    assert path.stat().st_size > 100


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, **arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_predictions(tmp_path / "out.npz", PREDICTIONS)
    assert list(tmp_path.iterdir()) == []


def test_output_paths(tmp_path: Path) -> None:
    assert default_output_path(Path("in/x.npz")) == Path("in/x-predictions.npz")
    assert default_output_path(Path("x.npy")) == Path("x-predictions.npz")
    (tmp_path / "folder.npz").mkdir()
    for path, message in (
        (tmp_path / "out.npy", "ends in .npz"),
        (tmp_path / "no" / "out.npz", "no such folder"),
        (tmp_path / "folder.npz", "is a folder"),
    ):
        with pytest.raises(InputError, match=message):
            check_output_path(path, force=True)

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from te_runtime.arrays_io import (
    check_output_path,
    check_output_spares,
    default_output_path,
    read_inputs,
    write_predictions,
)
from te_runtime.errors import InputError
from te_runtime.manifest import TensorSpec
from te_runtime.prediction import Prediction

X = TensorSpec("x", "float32", ("batch", 2))
Z = TensorSpec("z", "float32", ("batch", 2))
ROWS = np.arange(4.0).reshape(2, 2)
PREDICTIONS = {"a": Prediction(ROWS, None, "cpu"), "file": Prediction(ROWS + 1, ROWS + 2, "cpu")}


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


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a bundle of one subfolder, an input, and links to both."""
    (tmp_path / "b" / "fp32").mkdir(parents=True)
    (tmp_path / "b" / "golden.npz").touch()
    (tmp_path / "in.npz").touch()
    (tmp_path / "bundle-link").symlink_to("b")
    (tmp_path / "deep-link").symlink_to("b/fp32")
    (tmp_path / "golden-link.npz").symlink_to("b/golden.npz")
    (tmp_path / "in-link.npz").symlink_to("in.npz")
    (tmp_path / "in-hard.npz").hardlink_to(tmp_path / "in.npz")
    return tmp_path


@pytest.mark.parametrize(
    "output",
    [
        "b/out.npz",
        "b/fp32/out.npz",
        "b/fp32/../out.npz",
        "b/../b/out.npz",
        "bundle-link/out.npz",
        "deep-link/out.npz",
        "deep-link/../out.npz",
        "golden-link.npz",
    ],
)
@pytest.mark.parametrize("bundle", ["b", "bundle-link", "b/fp32/..", "b/"])
def test_no_output_goes_into_the_bundle(place: Path, output: str, bundle: str) -> None:
    with pytest.raises(InputError, match=r"lies in the bundle .*Pass -o with a file in another folder"):
        check_output_spares(place / output, bundle=place / bundle, input_file=place / "in.npz")


def test_a_bundle_is_known_by_its_folder_not_by_its_name(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place / "b")
    with pytest.raises(InputError, match="lies in the bundle"):
        check_output_spares(Path("out.npz"), bundle=place / "b", input_file=place / "in.npz")
    with pytest.raises(InputError, match="lies in the bundle"):
        check_output_spares(place / "b" / "out.npz", bundle=Path(), input_file=place / "in.npz")
    check_output_spares(Path("../out.npz"), bundle=Path(), input_file=place / "in.npz")


@pytest.mark.parametrize("output", ["in.npz", "./in.npz", "b/../in.npz", "in-link.npz", "in-hard.npz"])
def test_no_output_replaces_the_input(place: Path, output: str) -> None:
    with pytest.raises(InputError, match=r"is the input itself\. Pass -o with another name"):
        check_output_spares(place / output, bundle=place / "b", input_file=place / "in.npz")


def test_other_outputs_may_be_written(place: Path) -> None:
    (place / "bb").mkdir()
    for output in ("out.npz", "bb/out.npz", "b/../out.npz"):
        check_output_spares(place / output, bundle=place / "b", input_file=place / "in.npz")
    check_output_spares(place / "out.npz", bundle=place / "no", input_file=place / "no.npz")

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import te_runtime
from te_runtime.bundle import open_bundle
from te_runtime.errors import BundleError
from te_runtime.file_marks import FileMarks

X = np.ones((2, 6), dtype=np.float32)
WEIGHTS, TAIL = "fp32/weights.bin", "fp32/tail-task_1.onnx"


def written_to(path: Path) -> None:
    """The same number of bytes, and the same time to the second."""
    before = path.stat()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))


def replaced(path: Path) -> None:
    """Another file of the same size and time under the same name."""
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(bytes(before.st_size))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def touched(path: Path) -> None:
    path.touch()


def gone(path: Path) -> None:
    path.unlink()


CHANGES = (written_to, replaced, cut_off, gone)


def test_files_that_stay_as_they_are_pass(bundle: Path) -> None:
    marks = FileMarks(open_bundle(bundle), [WEIGHTS, TAIL])
    marks.require_unchanged(WEIGHTS, TAIL)
    written_to(bundle / "golden.npz")
    marks.require_unchanged(WEIGHTS, TAIL)


@pytest.mark.parametrize("change", [*CHANGES, touched])
@pytest.mark.parametrize("name", [WEIGHTS, TAIL])
def test_a_changed_file_is_named(bundle: Path, name: str, change: Callable[[Path], None]) -> None:
    marks = FileMarks(open_bundle(bundle), [WEIGHTS, TAIL])
    change(bundle / name)
    with pytest.raises(BundleError, match=rf"{name}: was changed since the bundle was loaded. Load it again"):
        marks.require_unchanged(WEIGHTS, TAIL)


def test_another_folder_in_its_place_is_refused(bundle: Path, tmp_path: Path) -> None:
    marks = FileMarks(open_bundle(bundle), [WEIGHTS])
    bundle.rename(tmp_path / "old")
    shutil.copytree(tmp_path / "old", bundle)
    with pytest.raises(BundleError, match="was replaced since it was opened"):
        marks.require_unchanged(WEIGHTS)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [WEIGHTS, TAIL])
def test_what_changed_since_is_not_loaded(bundle: Path, name: str, change: Callable[[Path], None]) -> None:
    with te_runtime.load(bundle, threads=1) as model:
        change(bundle / name)
        for _ in range(2):
            for call in (lambda: model.predict(X, ["task_1"]), lambda: model.prepare(["task_1"])):
                with pytest.raises(BundleError, match=rf"{name}: was changed since the bundle was loaded"):
                    call()


@pytest.mark.parametrize("change", [replaced, gone])
@pytest.mark.parametrize("name", [WEIGHTS, TAIL])
def test_a_model_goes_on_with_what_it_has_loaded(
    bundle: Path, name: str, change: Callable[[Path], None]
) -> None:
    with te_runtime.load(bundle, threads=1) as model:
        expected = model.predict(X)["task_1"].output
        change(bundle / name)
        with pytest.raises(BundleError, match="was changed"):
            model.prepare(["task_1"])
        np.testing.assert_array_equal(model.predict(X)["task_1"].output, expected)


def test_a_model_goes_on_after_its_bundle_was_replaced_with_what_it_has_loaded(
    bundle: Path, tiny: ModuleType, tmp_path: Path
) -> None:
    with te_runtime.load(bundle, threads=1) as model:
        expected = model.predict(X)["task_1"].output
        bundle.rename(tmp_path / "old")
        tiny.write_tiny_bundle(bundle, seed=1)
        shutil.rmtree(tmp_path / "old")
        np.testing.assert_array_equal(model.predict(X)["task_1"].output, expected)
        with pytest.raises(BundleError, match=r"was replaced since it was opened\. Load it again"):
            model.predict(X, ["task_1"])


def test_what_was_prepared_needs_the_files_no_more(bundle: Path) -> None:
    with te_runtime.load(bundle, threads=1) as model:
        model.prepare(["task_1"])
        expected = model.predict(X, ["task_1"])["task_1"].output
        shutil.rmtree(bundle)
        np.testing.assert_array_equal(model.predict(X, ["task_1"])["task_1"].output, expected)

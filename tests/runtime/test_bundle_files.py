from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import te_runtime
from te_runtime import bundle_files
from te_runtime.bundle import open_bundle
from te_runtime.bundle_files import BackgroundSums
from te_runtime.errors import BundleError


@dataclass
class Large:
    """A bundle whose weights are large enough to be summed up in the background."""

    root: Path

    @property
    def weights(self) -> Path:
        return self.root / "fp32" / "weights.bin"

    def change_a_byte(self) -> None:
        data = bytearray(self.weights.read_bytes())
        data[len(data) // 2] ^= 1
        self.weights.write_bytes(data)


@pytest.fixture
def large(tiny: ModuleType, tmp_path: Path) -> Large:
    tiny.write_tiny_bundle(tmp_path / "large", hidden=150_000, standalone=False)
    return Large(tmp_path / "large")


def test_large_files_are_summed_up_while_the_caller_goes_on(large: Large) -> None:
    opened = open_bundle(large.root, wait=False)
    assert opened.pending is not None
    opened.start_check()
    opened.finish_check()
    assert open_bundle(large.root).pending is None
    assert open_bundle(large.root, check="size", wait=False).pending is None


def test_a_changed_byte_found_in_the_background_is_raised(large: Large) -> None:
    large.change_a_byte()
    opened = open_bundle(large.root, wait=False)
    opened.start_check()
    for _ in range(2):
        with pytest.raises(BundleError, match=r"weights\.bin: sha256 .*: the file was changed"):
            opened.finish_check()


@pytest.mark.parametrize("mode", ["joint", "split", "task"])
def test_no_model_comes_of_changed_weights(large: Large, mode: te_runtime.Mode) -> None:
    large.change_a_byte()
    with pytest.raises(BundleError, match="the file was changed"):
        te_runtime.load(large.root, mode=mode)
    with te_runtime.load(large.root, mode=mode, check="size") as model:  # what was asked for: no checksum
        assert model.predict(np.zeros((1, 6), dtype=np.float32))


def test_graphs_are_compared_before_onnxruntime_sees_them(
    large: Large, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = large.root / "fp32" / "trunk.onnx"
    path.write_bytes(path.read_bytes()[::-1])
    monkeypatch.setattr("te_runtime.predictor._open", lambda *_: pytest.fail("a graph was opened"))
    with pytest.raises(BundleError, match=r"trunk\.onnx: sha256"):
        te_runtime.load(large.root)


def test_any_error_on_the_thread_is_raised_by_finish(large: Large, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(bundle_files, "check_sha256", fail)
    entries = open_bundle(large.root, check="size").manifest.files
    sums = BackgroundSums(str(large.root), entries)
    sums.start()
    with pytest.raises(MemoryError, match="no room"):
        sums.finish()

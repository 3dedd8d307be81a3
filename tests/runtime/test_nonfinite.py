from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import te_runtime
from te_runtime import InputError


def test_the_first_of_them_is_told(pristine: Path) -> None:
    x = np.zeros((5, 6), dtype=np.float32)
    x[3, 2] = np.inf
    x[4, 0] = np.nan
    with te_runtime.load(pristine, on_nonfinite="error") as model:
        with pytest.raises(
            InputError,
            match=r"input 'x': 2 of 30 values are NaN or infinite, the first \(inf\) at row 3, column 2, counted",
        ):
            model.predict(x)
        assert model.predict(x[:3])["task_0"].output.shape == (3, 2)
        assert model.predict(x[:0].astype(np.float64))["task_0"].output.shape == (0, 2)
        assert model.utilization()["task_0"].rows == 3


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_they_are_found_after_casting_too(tiny: ModuleType, tmp_path: Path, dtype: type) -> None:
    tiny.write_tiny_bundle(tmp_path / "b", two_inputs=True)
    z = np.array([[0, -np.inf]], dtype=dtype)
    with (
        te_runtime.load(tmp_path / "b", on_nonfinite="error") as model,
        pytest.raises(InputError, match=r"input 'z': 1 of 2 values .* \(-inf\) at row 0, column 1"),
    ):
        model.predict({"x": np.zeros((1, 6), dtype), "z": z})


def test_they_pass_unless_told_otherwise(pristine: Path) -> None:
    with te_runtime.load(pristine) as model:
        assert np.isnan(model.predict(np.full((1, 6), np.nan))["task_0"].output).all()
    with pytest.raises(InputError, match="on_nonfinite: found 'warn', expected 'pass' or 'error'"):
        te_runtime.load(pristine, on_nonfinite="warn")


def test_plain_and_odd_arrays_give_the_same(pristine: Path) -> None:
    """Read-only, strided, reversed, misaligned, big-endian and subclassed arrays go the long way round."""
    x = np.random.default_rng(0).standard_normal((4, 6), dtype=np.float32)
    wide = np.zeros((8, 12), dtype=np.float32)
    wide[::2, ::2] = x
    raw = np.zeros(x.nbytes + 1, dtype=np.uint8)
    misaligned = raw[1:].view(np.float32).reshape(4, 6)
    misaligned[:] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    odd = [wide[::2, ::2], np.asfortranarray(x), misaligned, x.astype(">f4"), frozen, x.view(np.memmap)]
    with te_runtime.load(pristine) as model:
        expected = model.predict(x)["task_0"].output
        for array in odd:
            np.testing.assert_array_equal(model.predict(array)["task_0"].output, expected)

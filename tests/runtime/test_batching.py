from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import te_runtime
from te_runtime import InputError


@pytest.mark.parametrize("mode", ["joint", "split", "task"])
@pytest.mark.parametrize("max_batch", [1, 3, 4, 10, 11])
def test_parts_joined_are_the_whole(pristine: Path, mode: str, max_batch: int) -> None:
    """Batches of other sizes go through other kernels: 1e-5 of the largest value, as for the oracle."""
    x = np.random.default_rng(0).standard_normal((10, 6), dtype=np.float32)
    with (
        te_runtime.load(pristine, mode=mode) as whole,
        te_runtime.load(pristine, mode=mode, max_batch=max_batch) as cut,
    ):
        expected, found = whole.predict(x), cut.predict(x)
        assert cut.utilization()["task_0"].rows == 10
    for task, (output, weights, _) in found.items():
        assert output.shape == expected[task].output.shape
        np.testing.assert_allclose(output, expected[task].output, atol=1e-5 * np.abs(output).max(), rtol=0)
        np.testing.assert_allclose(weights, expected[task].routing_weights, atol=1e-5, rtol=0)


def test_inputs_are_cut_together_and_no_run_is_larger(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.write_tiny_bundle(tmp_path / "b", two_inputs=True, gated=False)
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((7, 6)), "z": rng.standard_normal((7, 2))}
    with te_runtime.load(tmp_path / "b", max_batch=2) as cut, te_runtime.load(tmp_path / "b") as whole:
        found, expected = cut.predict(feeds, ["task_1"]), whole.predict(feeds, ["task_1"])
    assert list(found) == ["task_1"]
    assert found["task_1"].routing_weights is None
    np.testing.assert_allclose(found["task_1"].output, expected["task_1"].output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_batch", [0, -1, 2.0, True, "8"])
def test_limits_that_cannot_be_meant_are_refused(pristine: Path, max_batch: object) -> None:
    with pytest.raises(InputError, match=r"max_batch: found .*, expected a whole number from 1"):
        te_runtime.load(pristine, max_batch=max_batch)

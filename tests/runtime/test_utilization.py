from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import te_runtime
from te_runtime.errors import BundleError
from te_runtime.manifest import TaskUtilization, parse_manifest
from te_runtime.utilization import UtilizationCounter


def rows_of(count: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 6), dtype=np.float32)


def set_baseline(tiny: ModuleType, root: Path, mean: list[float]) -> None:
    def edit(data: dict[str, list[dict[str, object]]]) -> None:
        for entry in data["utilization"]:
            entry["mean"] = mean

    tiny.edit_manifest(root, edit)


def test_nothing_seen(bundle: Path) -> None:
    with te_runtime.load(bundle, threads=1) as model:
        model.predict(rows_of(0))
        found = model.utilization()
    assert list(found) == ["task_0", "task_1"]
    assert (found["task_0"].rows, found["task_0"].mean, found["task_0"].distance) == (0, None, None)


@pytest.mark.parametrize("batches", [[1], [1, 2, 1, 64], [65, 3, 300], [1] * 600])
def test_the_mean_is_that_of_every_row(bundle: Path, tiny: ModuleType, batches: list[int]) -> None:
    baseline = [0.5, 0.25, 0.25]
    set_baseline(tiny, bundle, baseline)
    with te_runtime.load(bundle, threads=1) as model:
        seen = [
            model.predict(rows_of(count, seed))["task_1"].routing_weights
            for seed, count in enumerate(batches)
        ]
        found = model.utilization()["task_1"]
    mean = np.concatenate(seen).astype(np.float64).mean(axis=0)
    assert found.rows == sum(batches)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)  # float64 sums of at most 600 rows
    assert found.baseline == tuple(baseline)
    assert found.distance == pytest.approx(np.abs(mean - baseline).sum() / 2, rel=1e-12)


def test_only_tasks_asked_for_count_in_any_order(bundle: Path) -> None:
    with te_runtime.load(bundle, threads=1) as model:
        alone = model.predict(rows_of(2), tasks=["task_1"])["task_1"].routing_weights
        both = model.predict(rows_of(3), tasks=["task_1", "task_0"])
        found = model.utilization()
    assert (found["task_0"].rows, found["task_1"].rows) == (3, 5)
    mean = np.concatenate([alone, both["task_1"].routing_weights]).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(found["task_1"].mean, mean, rtol=1e-12)


def test_reset_begins_again(bundle: Path) -> None:
    with te_runtime.load(bundle, threads=1) as model:
        model.predict(rows_of(4))
        assert model.utilization(reset=True)["task_0"].rows == 4
        assert model.utilization()["task_0"].rows == 0
        model.predict(rows_of(1))
    assert model.utilization()["task_0"].rows == 1  # a closed model still tells


def test_what_a_caller_does_to_an_answer_does_not_count(bundle: Path) -> None:
    with te_runtime.load(bundle, threads=1) as model:
        model.predict(rows_of(1))["task_0"].routing_weights[:] = 100
        assert sum(model.utilization()["task_0"].mean) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("rows", [2, 100, 2000])
def test_rows_that_are_not_finite_are_left_out(bundle: Path, rows: int) -> None:
    x = rows_of(rows)
    x[0] = np.nan
    with te_runtime.load(bundle, threads=1) as model:
        model.predict(x)
        found = model.utilization()["task_0"]
    assert (found.rows, found.rows_not_finite) == (rows - 1, 1)
    assert sum(found.mean) == pytest.approx(1, rel=1e-6)


def test_tasks_without_a_gate_are_left_out(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.write_tiny_bundle(tmp_path / "b", gated=False)
    with te_runtime.load(tmp_path / "b") as model:
        model.predict(rows_of(2))
        assert model.utilization() == {}


def test_every_row_counts_once_from_many_threads(bundle: Path) -> None:
    with te_runtime.load(bundle, threads=1) as model, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: model.predict(rows_of(1 + seed % 3, seed)), range(3000)))
        seen = model.utilization(reset=True)
        assert {task: own.rows for task, own in seen.items()} == {"task_0": 6000, "task_1": 6000}


def test_a_baseline_of_another_size_is_refused(pristine: Path) -> None:
    manifest = parse_manifest((pristine / "manifest.json").read_bytes(), "manifest.json")
    wrong = TaskUtilization("task_0", (1.0,), (1.0,), (1.0,), (1,))
    with pytest.raises(BundleError, match="'task_0' has 1 experts, its routing weights have 3"):
        UtilizationCounter(manifest._replace(utilization=(wrong,)))
    assert UtilizationCounter(manifest._replace(utilization=())).report()["task_0"].baseline is None

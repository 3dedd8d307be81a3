"""On a real GPU. These tests run wherever onnxruntime can use one, and skip with the reason elsewhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import te_runtime
from te_runtime.doctor import examine

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpu")]

# The CPU and the GPU sum in other orders; without TF32 both keep float32's 24 bits.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def x(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 6)).astype(np.float32)


def assert_close(found: te_runtime.Model, reference: te_runtime.Model, rows: int) -> None:
    expected = reference.predict(x(rows))
    for task, prediction in found.predict(x(rows)).items():
        np.testing.assert_allclose(prediction.output, expected[task].output, **TOLERANCE)
        np.testing.assert_allclose(prediction.routing_weights, expected[task].routing_weights, **TOLERANCE)


@pytest.mark.parametrize("mode", ["joint", "split", "task"])
@pytest.mark.parametrize("recorded", [(), (1, 8)])
def test_the_gpu_gives_the_cpu_s_answers(pristine: Path, mode: str, recorded: tuple[int, ...]) -> None:
    options = te_runtime.CudaOptions(graph_batch_sizes=recorded)
    with (
        te_runtime.load(pristine, provider="cuda", mode=mode, cuda=options) as found,
        te_runtime.load(pristine) as reference,
    ):
        for rows in (1, 8, 3, 1, 8, 8):
            assert_close(found, reference, rows)


def test_the_golden_rows_are_right_there(pristine: Path) -> None:
    for options in (None, te_runtime.CudaOptions(graph_batch_sizes=(1,))):
        with te_runtime.load(pristine, provider="cuda", cuda=options) as model:
            report = model.verify()
        assert report.ok, report.mismatches[:1]
        assert report.provider == "cuda"


def test_auto_takes_the_gpu_and_names_it(pristine: Path, gpu: str) -> None:
    with te_runtime.load(pristine, provider="auto") as model:
        assert model.provider == "cuda"
        assert model.provider_choice.device == gpu
    doctor = examine()
    assert doctor.works == ("cuda", "cpu")
    assert doctor.cuda.driver.devices[0].name == gpu


@pytest.mark.parametrize("recorded", [(), (1, 4)])
def test_threads_may_share_a_model(pristine: Path, recorded: tuple[int, ...]) -> None:
    options = te_runtime.CudaOptions(graph_batch_sizes=recorded)
    with te_runtime.load(pristine, provider="cuda", cuda=options) as model:
        expected = {seed: model.predict(x(1 + seed, seed)) for seed in range(4)}

        def work(seed: int) -> None:
            for _ in range(50):
                found = model.predict(x(1 + seed, seed))
                for task, prediction in expected[seed].items():
                    np.testing.assert_array_equal(found[task].output, prediction.output)

        with ThreadPoolExecutor(len(expected)) as pool:
            list(pool.map(work, expected))  # raises what a thread raised

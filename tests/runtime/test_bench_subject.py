"""Bundles loaded to be measured: what their memory is said to be, on the CPU and on a GPU that tests make up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from te_runtime import bench_memory, bench_subject
from te_runtime.bench_json import subject_json
from te_runtime.bench_memory import GpuMemory, read_gpu, read_pss_bytes
from te_runtime.bench_options import LoadOptions
from te_runtime.bench_page import Page
from te_runtime.bench_rows import read_bench_rows
from te_runtime.bench_subject import Subject, open_subject
from te_runtime.bench_subject_text import subject_lines
from te_runtime.cuda_driver import DeviceMemory
from te_runtime.predictor import Model, load
from te_runtime.providers import CudaOptions, ProviderChoice

MB = 1_000_000


def test_pss_where_linux_tells_it(tmp_path: Path) -> None:
    rollup = tmp_path / "smaps_rollup"
    assert read_pss_bytes(rollup) is None
    rollup.write_text(
        "5581-7ffc ---p 00000000 00:00 0  [rollup]\nRss:  2000 kB\nPss:  1500 kB\nPss_Anon: 9 kB\n"
    )
    assert read_pss_bytes(rollup) == 1_536_000
    rollup.write_text("Rss:  2000 kB\n")
    assert read_pss_bytes(rollup) is None


def test_there_is_no_cuda_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_memory.platform, "system", lambda: "Darwin")
    assert read_gpu(0) == DeviceMemory(None, "there is no CUDA on Darwin")


class OnGpu(Model):
    """A model that runs on the CPU and says that it does not."""

    @property
    def provider(self) -> Any:
        return "cuda"

    @property
    def provider_choice(self) -> ProviderChoice:
        return ProviderChoice("cuda", "cuda", "asked for", "Test GPU")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(path: Path, **options: Any) -> Model:
        assert (options["provider"], options["cuda"]) == ("cuda", CudaOptions(device_id=3))
        model = load(path)
        model.__class__ = OnGpu
        return model

    monkeypatch.setattr(bench_subject, "load", loaded)


def opened(fakes: ModuleType, path: Path, *readings: DeviceMemory, **how: Any) -> Subject:
    left = iter(readings)

    def gpu(number: int) -> DeviceMemory:
        assert number == 3
        return next(left)

    pss: Iterator[int] = iter((30 * MB, 50 * MB))
    rows = read_bench_rows(path, None)
    subject = open_subject(
        path, rows, LoadOptions(**how), fakes.FakeClock(), pss_bytes=lambda: next(pss), gpu=gpu
    )
    subject.close()
    assert list(left) == []
    return subject


def told(subject: Subject) -> str:
    return "\n".join(subject_lines(Page(), "", subject, is_second=False))


CUDA = {"provider": "cuda", "cuda": CudaOptions(device_id=3)}


@pytest.mark.usefixtures("on_gpu")
def test_memory_of_the_gpu_is_what_came_in_between(bench_fakes: ModuleType, pristine: Path) -> None:
    subject = opened(
        bench_fakes, pristine, DeviceMemory(400 * MB, None), DeviceMemory(650 * MB, None), **CUDA
    )
    text = told(subject)
    assert "memory       20.0 MB for the model, in main memory" in text
    assert "GPU memory   250.0 MB for the model (in use on the GPU, by whatever runs" in text
    assert "400.0 MB before loading, 650.0 MB after the first prediction)" in text
    assert subject_json(subject)["gpu_memory"] == {
        "before_bytes": 400 * MB,
        "ready_bytes": 650 * MB,
        "model_bytes": 250 * MB,
        "not_measured": None,
    }


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("fails", [0, 1])
def test_memory_of_a_gpu_that_cannot_be_asked(bench_fakes: ModuleType, pristine: Path, fails: int) -> None:
    readings = [DeviceMemory(400 * MB, None), DeviceMemory(650 * MB, None)]
    readings[fails] = DeviceMemory(None, "cuInit gives error 100")
    subject = opened(bench_fakes, pristine, *readings, **CUDA)
    assert "GPU memory   not measured: cuInit gives error 100" in told(subject)
    found = subject_json(subject)["gpu_memory"]
    assert (found["model_bytes"], found["not_measured"]) == (None, "cuInit gives error 100")


@pytest.mark.usefixtures("on_gpu")
def test_others_that_gave_memory_back_leave_no_negative_size(bench_fakes: ModuleType, pristine: Path) -> None:
    subject = opened(
        bench_fakes, pristine, DeviceMemory(650 * MB, None), DeviceMemory(400 * MB, None), **CUDA
    )
    assert "GPU memory   0 bytes for the model" in told(subject)
    assert subject_json(subject)["gpu_memory"]["model_bytes"] == -250 * MB


def test_a_gpu_that_does_not_run_the_model_is_not_told_of(
    bench_fakes: ModuleType, pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = opened(bench_fakes, pristine, provider="cpu")
    assert subject_json(on_cpu)["gpu_memory"] is None
    assert "GPU" not in told(on_cpu)
    monkeypatch.setattr(bench_subject, "load", lambda path, **options: load(path))  # what auto comes to
    auto = {"provider": "auto", "cuda": CudaOptions(device_id=3)}
    assert opened(bench_fakes, pristine, DeviceMemory(400 * MB, None), **auto).gpu_memory is None


@pytest.mark.usefixtures("gpu")
def test_memory_of_a_real_gpu(bench_fakes: ModuleType, pristine: Path) -> None:
    options = LoadOptions("cuda", CudaOptions())
    subject = open_subject(pristine, read_bench_rows(pristine, None), options, bench_fakes.FakeClock())
    subject.close()
    assert subject.gpu_memory is not None
    assert subject.gpu_memory.problem is None
    assert subject.gpu_memory.ready.used_bytes > 0


def test_memory_that_the_system_does_not_tell(bench_fakes: ModuleType, pristine: Path) -> None:
    subject = replace(opened(bench_fakes, pristine), pss_before_bytes=None)
    assert "memory       not measured: only Linux tells" in told(subject)
    assert json.loads(json.dumps(subject_json(subject)))["model_pss_bytes"] is None


def test_a_reason_is_kept_where_nothing_was_measured() -> None:
    memory = GpuMemory(DeviceMemory(None, "first"), DeviceMemory(None, "second"))
    assert (memory.model_bytes, memory.problem) == (None, "first")

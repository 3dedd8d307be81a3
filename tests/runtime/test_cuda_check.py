from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from te_runtime.cuda_check import CudaReport, check_cuda
from te_runtime.cuda_driver import CudaDriver
from te_runtime.cuda_libraries import cuda_libraries


def only_finding(report: CudaReport) -> str:
    (finding,) = report.findings
    assert not report.has_run
    return str(finding)


def test_a_machine_on_which_cuda_works(fake: ModuleType) -> None:
    machine = fake.FakeMachine()
    report = check_cuda(machine)
    assert report.has_run
    assert report.findings == ()
    assert machine.asked == ["probe CUDAExecutionProvider {'device_id': '0'}"]


def test_no_driver(fake: ModuleType) -> None:
    machine = fake.FakeMachine(driver_found=fake.NO_DRIVER, kernel=None)
    text = only_finding(check_cuda(machine))
    assert "no NVIDIA driver: libcuda.so.1 does not load" in text
    assert "https://www.nvidia.com/drivers" in text
    assert machine.asked == []


def test_a_container_without_the_gpu(fake: ModuleType) -> None:
    text = only_finding(check_cuda(fake.FakeMachine(driver_found=fake.NO_DRIVER)))
    assert "580.65.06" in text
    assert "docker run --gpus all" in text


def test_a_driver_too_old_for_the_build(fake: ModuleType) -> None:
    old = CudaDriver((12, 8), (fake.GPU,), None)
    text = only_finding(check_cuda(fake.FakeMachine(driver_found=old)))
    assert "the NVIDIA driver runs CUDA up to 12.8, but onnxruntime is built for CUDA 13.0" in text
    assert "Update the driver to 580 or newer" in text


def test_a_missing_library_says_where_it_was_sought_and_the_command(fake: ModuleType, tmp_path: Path) -> None:
    there = frozenset(fake.NEEDS) - {"libcublas.so.13"}
    text = only_finding(check_cuda(fake.FakeMachine(on_loader_path=there, folders=(tmp_path,))))
    assert "missing: cuBLAS (libcublas.so.13); sought in the loader's path" in text
    assert "LD_LIBRARY_PATH (/opt/lib)" in text
    assert str(tmp_path) in text
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1'" in text


def test_another_cuda_major_is_a_missing_library(fake: ModuleType) -> None:
    cuda_12 = frozenset({"libcublasLt.so.12", "libcublas.so.12", "libcudart.so.12", "libcurand.so.10"})
    text = only_finding(check_cuda(fake.FakeMachine(on_loader_path=cuda_12)))
    assert "cuBLASLt (libcublasLt.so.13), cuBLAS (libcublas.so.13), CUDA runtime (libcudart.so.13)" in text


def test_missing_cudnn_counts_where_the_provider_is_linked_against_it(fake: ModuleType) -> None:
    without = frozenset(fake.NEEDS)
    assert check_cuda(fake.FakeMachine(on_loader_path=without)).has_run
    linked = (*fake.NEEDS, "libcudnn.so.9")
    text = only_finding(check_cuda(fake.FakeMachine(needs=linked, on_loader_path=without)))
    assert "missing: cuDNN (libcudnn.so.9)" in text


def test_libraries_of_python_packages_are_preloaded(fake: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "libcublas.so.13").touch()
    machine = fake.FakeMachine(
        on_loader_path=frozenset(fake.NEEDS) - {"libcublas.so.13"}, folders=(tmp_path,)
    )
    report = check_cuda(machine)
    assert report.has_run
    assert machine.asked[0] == "preload"
    (found,) = (library for library in report.libraries if library.title == "cuBLAS")
    assert found.found == str(tmp_path / "libcublas.so.13")


def test_a_probe_that_fails_tells_what_preloading_said(fake: ModuleType) -> None:
    machine = fake.FakeMachine(
        needs=(), preload_said="Failed to load x", problems={"CUDAExecutionProvider": "CUDA failure 35"}
    )
    text = only_finding(check_cuda(machine))
    assert "a graph of one node does not run there: CUDA failure 35" in text
    assert "Failed to load x" in text


def test_a_build_without_cuda(fake: ModuleType) -> None:
    machine = fake.FakeMachine(built_in=("CPUExecutionProvider",), installed={"onnxruntime": "1.31.1"})
    text = only_finding(check_cuda(machine))
    assert "onnxruntime 1.31.1 was built without CUDA" in text
    assert "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'" in text


def test_a_gpu_that_is_not_there(fake: ModuleType) -> None:
    text = only_finding(check_cuda(fake.FakeMachine(), device_id=1))
    assert "there is no GPU 1; there are 0 NVIDIA Test GPU" in text


def test_only_cuda_libraries_are_sought() -> None:
    found = cuda_libraries(("libcuda.so.1", "libc.so.6", "libcufft.so.11", "libcudnn.so.9"))
    assert [(library.title, library.is_required) for library in found] == [("cuFFT", True), ("cuDNN", True)]
    assert cuda_libraries(()) == ()


@pytest.mark.parametrize("system", ["Windows", "Darwin"])
def test_other_systems_are_judged_by_the_probe(fake: ModuleType, system: str) -> None:
    assert check_cuda(fake.FakeMachine(system=system, needs=())).has_run

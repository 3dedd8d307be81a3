"""Does CUDA work here, and if not, what is missing and what fixes it: the build, the driver, the libraries, a probe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from te_runtime.cuda_driver import CudaDriver
from te_runtime.cuda_libraries import LOADER, CudaLibrary, cuda_libraries, seek_libraries
from te_runtime.machine import Machine

__all__ = ["CUDA_PROVIDER", "CudaReport", "Finding", "check_cuda"]

CUDA_PROVIDER = "CUDAExecutionProvider"

# The first driver of each CUDA major version, CUDA Toolkit release notes, table 3.
_FIRST_DRIVERS = {12: "525", 13: "580"}
_GET_DRIVER = "https://www.nvidia.com/drivers"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: what it is, with what was found, and the command or step that fixes it."""

    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.problem}. {self.fix}"


@dataclass(frozen=True)
class CudaReport:
    """What CUDA needs and has here.

    Attributes:
        built_for: the CUDA version that onnxruntime was built for, `13.0`; None if built without CUDA.
        driver: what the NVIDIA driver says.
        kernel_driver: the driver in the kernel, as it names itself; None where there is none.
        libraries: the libraries sought; empty where that cannot be told or is of no use.
        folders: the Python packages' folders that were looked at.
        library_path: LD_LIBRARY_PATH, or PATH on Windows.
        findings: what is wrong; empty if CUDA works.
        has_run: whether a probe graph ran on the device.
    """

    built_for: str | None
    driver: CudaDriver
    kernel_driver: str | None
    libraries: tuple[CudaLibrary, ...]
    folders: tuple[Path, ...]
    library_path: str
    findings: tuple[Finding, ...]
    has_run: bool


def check_cuda(machine: Machine, device_id: int = 0) -> CudaReport:
    """Look at everything that CUDA needs; run a graph there if nothing is missing.

    Args:
        machine: where to look.
        device_id: the GPU to run the probe on.

    Raises:
        ProviderError: onnxruntime does not load.
    """
    ort = machine.onnxruntime()
    is_built_in = CUDA_PROVIDER in ort.get_available_providers()
    built_for = str(getattr(ort, "cuda_version", "") or "unknown") if is_built_in else None
    driver, kernel_driver = machine.driver(), machine.kernel_driver()
    libraries: tuple[CudaLibrary, ...] = ()
    folders: tuple[Path, ...] = ()
    if is_built_in:
        folders = machine.library_folders()
        needed = cuda_libraries(machine.cuda_needs())
        libraries = seek_libraries(needed, load=machine.load_library, folders=folders)
    findings = [
        *_build_findings(machine, built_for, str(ort.__version__)),
        *_driver_findings(driver, kernel_driver, built_for),
        *_library_findings(machine, libraries, folders, str(ort.__version__)),
    ]
    if not findings and device_id >= len(driver.devices):
        findings.append(_device_finding(driver, device_id))
    has_run = False
    if not findings:
        findings += _probe_findings(machine, libraries, device_id)
        has_run = not findings
    return CudaReport(
        built_for=built_for,
        driver=driver,
        kernel_driver=kernel_driver,
        libraries=libraries,
        folders=folders,
        library_path=machine.library_path,
        findings=tuple(findings),
        has_run=has_run,
    )


def _build_findings(machine: Machine, built_for: str | None, version: str) -> Iterator[Finding]:
    if built_for is not None:
        return
    installed = machine.distributions()
    if machine.system == "Darwin":
        yield Finding("onnxruntime has no CUDA on macOS", "Run with provider cpu.")
        return
    names = ", ".join(f"{name} {found}" for name, found in installed.items()) or f"onnxruntime {version}"
    yield Finding(
        f"{names} was built without CUDA",
        f"Run: pip uninstall -y {' '.join(installed) or 'onnxruntime'} && "
        f"pip install 'onnxruntime-gpu[cuda,cudnn]'",
    )


def _driver_findings(
    driver: CudaDriver, kernel_driver: str | None, built_for: str | None
) -> Iterator[Finding]:
    if driver.problem is not None and kernel_driver is not None:
        yield Finding(
            f"the NVIDIA driver is in the kernel ({kernel_driver}), but {driver.problem}",
            "In a container, start it with the GPU: docker run --gpus all (NVIDIA Container Toolkit). "
            "Otherwise check that nvidia-smi lists a GPU and CUDA_VISIBLE_DEVICES does not hide it.",
        )
        return
    if driver.problem is not None:
        yield Finding(
            f"no NVIDIA driver: {driver.problem}",
            f"On a machine with an NVIDIA GPU install its driver ({_GET_DRIVER}; Ubuntu: "
            "sudo ubuntu-drivers install); otherwise run with provider cpu.",
        )
        return
    major = _major(built_for)
    if major is not None and driver.cuda_version is not None and driver.cuda_version[0] < major:
        found = ".".join(map(str, driver.cuda_version))
        first = f"{_FIRST_DRIVERS[major]} or newer" if major in _FIRST_DRIVERS else "a newer one"
        yield Finding(
            f"the NVIDIA driver runs CUDA up to {found}, but onnxruntime is built for CUDA {built_for}",
            f"Update the driver to {first} ({_GET_DRIVER}).",
        )


def _library_findings(
    machine: Machine, libraries: tuple[CudaLibrary, ...], folders: tuple[Path, ...], version: str
) -> Iterator[Finding]:
    missing = [library for library in libraries if library.is_required and library.found is None]
    if not missing:
        return
    names = ", ".join(f"{library.title} ({library.file})" for library in missing)
    sought = ["the loader's path", f"LD_LIBRARY_PATH ({machine.library_path or 'not set'})"]
    sought += [str(folder) for folder in folders] or ["no NVIDIA package is installed beside onnxruntime"]
    yield Finding(
        f"missing: {names}; sought in {', '.join(sought)}",
        f"Run: pip install 'onnxruntime-gpu[cuda,cudnn]=={version}'",
    )


def _device_finding(driver: CudaDriver, device_id: int) -> Finding:
    names = ", ".join(f"{device.number} {device.name}" for device in driver.devices)
    return Finding(f"there is no GPU {device_id}; there are {names}", "Pass a device_id among them.")


def _probe_findings(
    machine: Machine, libraries: tuple[CudaLibrary, ...], device_id: int
) -> Iterator[Finding]:
    is_in_package = any(library.found not in (None, LOADER) for library in libraries)
    said = machine.preload_cuda() if is_in_package or not libraries else ""
    problem = machine.probe(CUDA_PROVIDER, {"device_id": str(device_id)})
    if problem is not None:
        yield Finding(
            f"nothing is missing, but a graph of one node does not run there: {problem}"
            + (f" (onnxruntime.preload_dlls: {said})" if said else ""),
            "Check the GPU with nvidia-smi; otherwise run with provider cpu.",
        )


def _major(version: str | None) -> int | None:
    head = (version or "").partition(".")[0]
    return int(head) if head.isdigit() else None

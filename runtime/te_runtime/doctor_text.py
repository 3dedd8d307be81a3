"""What `te-runtime doctor` prints: aligned lines for people, JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from te_runtime.cuda_check import CudaReport
from te_runtime.cuda_libraries import LOADER
from te_runtime.describe import Json, shown_bytes
from te_runtime.doctor import Doctor

__all__ = ["doctor_json", "doctor_text"]

_OK, _MISSING, _NONE = "ok", "missing", "—"


def doctor_text(doctor: Doctor) -> Iterator[str]:
    """The lines of `te-runtime doctor`."""
    yield _line(_OK, "te_runtime", doctor.te_runtime or "not installed as a package")
    yield _line(_OK, "Python", f"{doctor.python} on {doctor.system}")
    yield from _cpu_lines(doctor)
    yield from _onnxruntime_lines(doctor)
    if doctor.cuda is not None:
        yield from _cuda_lines(doctor.cuda)
    for part in doctor.not_looked_at:
        yield _line(_NONE, "not looked at", part)
    yield ""
    for name in ("cpu", "cuda"):
        yield f"provider {name:5} {'works here' if name in doctor.works else 'does not work here'}"
    if doctor.works:
        yield f"provider auto  takes {doctor.works[0]}"
    for finding in doctor.findings:
        yield f"problem: {finding.problem}"
        yield f"    fix: {finding.fix}"


def doctor_json(doctor: Doctor) -> dict[str, Json]:
    """What `te-runtime doctor --json` prints."""
    cuda = doctor.cuda
    return {
        "can_run": doctor.can_run,
        "works": list(doctor.works),
        "auto": doctor.works[0] if doctor.works else None,
        "findings": [dataclasses.asdict(finding) for finding in doctor.findings],
        "te_runtime": doctor.te_runtime,
        "python": doctor.python,
        "system": doctor.system,
        "cpu": dataclasses.asdict(doctor.cpu),
        "cpu_problem": doctor.cpu_problem,
        "onnxruntime": {
            "distributions": dict(doctor.onnxruntime.distributions),
            "version": doctor.onnxruntime.version,
            "built_in": list(doctor.onnxruntime.built_in),
            "problem": doctor.onnxruntime.problem,
        },
        "cuda": None if cuda is None else _cuda_json(cuda),
        "not_looked_at": list(doctor.not_looked_at),
    }


def _cuda_json(cuda: CudaReport) -> Json:
    version = cuda.driver.cuda_version
    return {
        "built_for": cuda.built_for,
        "driver_cuda_version": None if version is None else ".".join(map(str, version)),
        "driver_problem": cuda.driver.problem,
        "kernel_driver": cuda.kernel_driver,
        "devices": [dataclasses.asdict(device) for device in cuda.driver.devices],
        "libraries": [dataclasses.asdict(library) for library in cuda.libraries],
        "folders": [str(folder) for folder in cuda.folders],
        "library_path": cuda.library_path,
        "has_run": cuda.has_run,
    }


def _line(state: str, name: str, text: str) -> str:
    return f"{state:8} {name:18} {text}"


def _cpu_lines(doctor: Doctor) -> Iterator[str]:
    cpu = doctor.cpu
    yield _line(_OK, "CPU", f"{cpu.model}, {cpu.architecture}, {cpu.usable} of {cpu.total} CPUs usable")
    if cpu.features:
        words = (f"{name} {'yes' if has else 'no'}" for name, has in cpu.features.items())
        yield _line(_OK, "CPU features", ", ".join(words))


def _onnxruntime_lines(doctor: Doctor) -> Iterator[str]:
    found = doctor.onnxruntime
    names = ", ".join(f"{name} {version}" for name, version in found.distributions.items())
    if len(found.distributions) > 1:
        yield _line("broken", "onnxruntime", f"installed together: {names}")
        return
    if found.version is None:
        yield _line("broken" if names else _MISSING, "onnxruntime", names or "not installed")
        return
    yield _line(_OK, "onnxruntime", names or f"{found.version}, not installed as a package")
    yield _line(_OK, "built in", ", ".join(found.built_in))
    state = _OK if doctor.cpu_problem is None else "broken"
    yield _line(state, "CPU run", doctor.cpu_problem or "a graph ran")


def _cuda_lines(cuda: CudaReport) -> Iterator[str]:
    driver = cuda.driver
    if cuda.built_for is None:
        yield _line(_NONE, "CUDA provider", "onnxruntime was built without it")
    if driver.cuda_version is None:
        yield _line(_MISSING, "NVIDIA driver", driver.problem or "not found")
    else:
        version = ".".join(map(str, driver.cuda_version))
        needs = f", onnxruntime is built for CUDA {cuda.built_for}" if cuda.built_for else ""
        yield _line(
            _OK if driver.problem is None else "broken", "NVIDIA driver", f"runs CUDA up to {version}{needs}"
        )
    if cuda.kernel_driver is not None:
        yield _line(_OK, "driver in kernel", cuda.kernel_driver)
    for device in driver.devices:
        memory = shown_bytes(device.memory_bytes)
        yield _line(_OK, f"GPU {device.number}", f"{device.name}, {memory}, capability {device.capability}")
    yield from _library_lines(cuda)
    if cuda.has_run:
        yield _line(_OK, "CUDA run", "a graph ran")


def _library_lines(cuda: CudaReport) -> Iterator[str]:
    for library in cuda.libraries:
        if library.found is not None:
            where = "by the loader" if library.found == LOADER else library.found
            yield _line(_OK, library.title, f"{library.file}, found {where}")
        elif library.is_required:
            yield _line(_MISSING, library.title, library.file)
        else:
            yield _line(
                _NONE,
                library.title,
                f"{library.file} is not there; only some operators (convolutions) ask for it",
            )
    if cuda.libraries:
        folders = ", ".join(map(str, cuda.folders)) or "no NVIDIA package beside onnxruntime"
        yield _line(_NONE, "sought in", f"the loader's path; library path {cuda.library_path or 'not set'}")
        yield _line(_NONE, "", folders)

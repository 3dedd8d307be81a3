"""The NVIDIA driver, asked through its own library (libcuda) and without the CUDA toolkit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

__all__ = [
    "DRIVER_LIBRARIES",
    "CudaDevice",
    "CudaDriver",
    "DeviceMemory",
    "read_device_memory",
    "read_driver",
]

DRIVER_LIBRARIES = {"Linux": "libcuda.so.1", "Windows": "nvcuda.dll"}
"""System, as platform.system() names it → the file name of the driver's library; there is no CUDA elsewhere."""

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute, CUDA Driver API


@dataclass(frozen=True)
class CudaDevice:
    """One GPU: its number for ONNX Runtime, its name, its memory, and its compute capability such as `9.0`."""

    number: int
    name: str
    memory_bytes: int
    capability: str


@dataclass(frozen=True)
class CudaDriver:
    """What the driver says.

    Attributes:
        cuda_version: the newest CUDA that it runs, (major, minor); None where it could not be asked.
        devices: the GPUs that this process may use.
        problem: why it cannot be used; None if it can.
    """

    cuda_version: tuple[int, int] | None
    devices: tuple[CudaDevice, ...]
    problem: str | None


@dataclass(frozen=True)
class DeviceMemory:
    """How much of a GPU's memory is in use, by whatever runs there; None, and why, where the driver cannot be asked."""

    used_bytes: int | None
    problem: str | None


class _CallFailedError(Exception):
    """A driver call gave an error code."""


def read_driver(name: str, load: Callable[[str], ctypes.CDLL]) -> CudaDriver:
    """Ask the driver for its version and its devices.

    Args:
        name: file name of the driver's library, `libcuda.so.1` on Linux.
        load: loads a library by name and raises OSError where there is none.
    """
    try:
        library = load(name)
    except OSError as error:
        reason = str(error).removeprefix(f"{name}: ")
        return CudaDriver(None, (), f"{name} does not load: {reason}")
    version: tuple[int, int] | None = None
    try:
        raw = ctypes.c_int(0)
        _call(library, "cuDriverGetVersion", ctypes.byref(raw))
        version = raw.value // 1000, raw.value % 1000 // 10
        _call(library, "cuInit", 0)
        count = ctypes.c_int(0)
        _call(library, "cuDeviceGetCount", ctypes.byref(count))
        devices = tuple(_device(library, number) for number in range(count.value))
    except (_CallFailedError, AttributeError) as error:
        return CudaDriver(version, (), f"{name} loads, but {error}")
    return CudaDriver(version, devices, None if devices else f"{name} loads, but sees no GPU")


def read_device_memory(name: str, load: Callable[[str], ctypes.CDLL], number: int) -> DeviceMemory:
    """Ask the driver how much of a GPU's memory is in use.

    It is asked within the device's primary context, which all of a process shares, so a context is part of every
    answer, and one that nothing else holds is gone again afterwards.

    Args:
        name: file name of the driver's library.
        load: loads a library by name and raises OSError where there is none.
        number: which GPU.
    """
    try:
        library = load(name)
        _call(library, "cuInit", 0)
        device = ctypes.c_int(0)
        _call(library, "cuDeviceGet", ctypes.byref(device), number)
        context = ctypes.c_void_p()
        _call(library, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            return DeviceMemory(_used_bytes(library, context), None)
        finally:
            _call(library, "cuDevicePrimaryCtxRelease_v2", device)
    except OSError as error:
        return DeviceMemory(None, f"{name} does not load: {str(error).removeprefix(f'{name}: ')}")
    except (_CallFailedError, AttributeError) as error:
        return DeviceMemory(None, f"{name} loads, but {error}")


def _used_bytes(library: ctypes.CDLL, context: ctypes.c_void_p) -> int:
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    _call(library, "cuCtxPushCurrent_v2", context)
    try:
        _call(library, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    finally:
        _call(library, "cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    return total.value - free.value


def _device(library: ctypes.CDLL, number: int) -> CudaDevice:
    device = ctypes.c_int(0)
    _call(library, "cuDeviceGet", ctypes.byref(device), number)
    name = ctypes.create_string_buffer(256)
    _call(library, "cuDeviceGetName", name, len(name), device)
    memory_bytes = ctypes.c_size_t(0)
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(memory_bytes), device)
    capability = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int(0)
        _call(library, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        capability.append(str(value.value))
    return CudaDevice(number, name.value.decode("utf-8", "replace"), memory_bytes.value, ".".join(capability))


def _call(library: ctypes.CDLL, function: str, *arguments: object) -> None:
    code = getattr(library, function)(*arguments)
    if code != 0:
        raise _CallFailedError(f"{function} gives {_error_name(library, code)}")


def _error_name(library: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    try:
        known = library.cuGetErrorName(code, ctypes.byref(text)) == 0
    except AttributeError:
        known = False
    return f"error {code}" + (f" ({text.value.decode('ascii', 'replace')})" if known and text.value else "")

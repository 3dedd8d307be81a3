from __future__ import annotations

import pytest

from te_runtime.cuda_driver import CudaDevice, read_driver


class FakeDriver:
    """libcuda with two GPUs; `fails` is a function that gives error 100."""

    def __init__(self, *, devices: int = 2, fails: str = "") -> None:
        self.devices = devices
        self.fails = fails

    def __getattr__(self, name: str) -> object:
        if name.startswith("cu"):
            return lambda *arguments: 100 if name == self.fails else getattr(self, f"do_{name}")(*arguments)
        raise AttributeError(f"undefined symbol: {name}")

    def do_cuDriverGetVersion(self, version: object) -> int:
        version._obj.value = 12080
        return 0

    def do_cuInit(self, flags: int) -> int:
        return 0

    def do_cuDeviceGetCount(self, count: object) -> int:
        count._obj.value = self.devices
        return 0

    def do_cuDeviceGet(self, device: object, number: int) -> int:
        device._obj.value = number
        return 0

    def do_cuDeviceGetName(self, name: object, size: int, device: object) -> int:
        name.value = f"GPU number {device.value}".encode()
        return 0

    def do_cuDeviceTotalMem_v2(self, size: object, device: object) -> int:
        size._obj.value = 8 * 10**9
        return 0

    def do_cuDeviceGetAttribute(self, value: object, attribute: int, device: object) -> int:
        value._obj.value = {75: 8, 76: 6}[attribute]
        return 0

    def do_cuGetErrorName(self, code: int, text: object) -> int:
        text._obj.value = b"CUDA_ERROR_NO_DEVICE"
        return 0


def test_version_and_devices() -> None:
    driver = read_driver("libcuda.so.1", lambda name: FakeDriver())
    assert driver.cuda_version == (12, 8)
    assert driver.devices[1] == CudaDevice(1, "GPU number 1", 8 * 10**9, "8.6")
    assert driver.problem is None


def test_no_library() -> None:
    def load(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    driver = read_driver("libcuda.so.1", load)
    assert (
        driver.problem
        == "libcuda.so.1 does not load: cannot open shared object file: No such file or directory"
    )
    assert driver.devices == ()


@pytest.mark.parametrize(
    ("fake", "problem"),
    [
        (FakeDriver(fails="cuInit"), "libcuda.so.1 loads, but cuInit gives error 100 (CUDA_ERROR_NO_DEVICE)"),
        (FakeDriver(devices=0), "libcuda.so.1 loads, but sees no GPU"),
        (object(), "libcuda.so.1 loads, but 'object' object has no attribute 'cuDriverGetVersion'"),
    ],
)
def test_a_driver_that_cannot_be_used_says_why(fake: object, problem: str) -> None:
    assert read_driver("libcuda.so.1", lambda name: fake).problem == problem

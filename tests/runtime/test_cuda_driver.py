from __future__ import annotations

import pytest

from te_runtime.cuda_driver import CudaDevice, DeviceMemory, read_device_memory, read_driver


class FakeDriver:
    """libcuda with two GPUs; `fails` is a function that gives error 100. Keeps which contexts are held and current."""

    def __init__(self, *, devices: int = 2, fails: str = "") -> None:
        self.devices = devices
        self.fails = fails
        self.held: list[int] = []
        self.current: list[int] = []

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

    def do_cuDevicePrimaryCtxRetain(self, context: object, device: object) -> int:
        self.held.append(device.value)
        context._obj.value = 1000 + device.value
        return 0

    def do_cuDevicePrimaryCtxRelease_v2(self, device: object) -> int:
        self.held.remove(device.value)
        return 0

    def do_cuCtxPushCurrent_v2(self, context: object) -> int:
        self.current.append(context.value)
        return 0

    def do_cuCtxPopCurrent_v2(self, context: object) -> int:
        context._obj.value = self.current.pop()
        return 0

    def do_cuMemGetInfo_v2(self, free: object, total: object) -> int:
        free._obj.value, total._obj.value = {1000: (7 * 10**9, 8 * 10**9), 1001: (2 * 10**9, 8 * 10**9)}[
            self.current[-1]
        ]
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


@pytest.mark.parametrize(("number", "used"), [(0, 10**9), (1, 6 * 10**9)])
def test_memory_in_use_is_read_in_the_context_of_the_gpu_which_is_let_go_again(
    number: int, used: int
) -> None:
    fake = FakeDriver()
    assert read_device_memory("libcuda.so.1", lambda name: fake, number) == DeviceMemory(used, None)
    assert (fake.held, fake.current) == ([], [])


@pytest.mark.parametrize(
    "fails",
    ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuMemGetInfo_v2"],
)
def test_memory_that_cannot_be_read_says_why_and_holds_nothing(fails: str) -> None:
    fake = FakeDriver(fails=fails)
    problem = f"libcuda.so.1 loads, but {fails} gives error 100 (CUDA_ERROR_NO_DEVICE)"
    assert read_device_memory("libcuda.so.1", lambda name: fake, 0) == DeviceMemory(None, problem)
    assert (fake.held, fake.current) == ([], [])


def test_memory_where_there_is_no_driver() -> None:
    def load(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    problem = "libcuda.so.1 does not load: cannot open shared object file"
    assert read_device_memory("libcuda.so.1", load, 0) == DeviceMemory(None, problem)
    assert "no attribute 'cuInit'" in str(
        read_device_memory("libcuda.so.1", lambda name: object(), 0).problem
    )

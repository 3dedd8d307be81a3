"""How much memory loading takes: of this process, where the system tells its own share, and of a GPU."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from pathlib import Path

from te_runtime.cuda_driver import DRIVER_LIBRARIES, DeviceMemory, read_device_memory

__all__ = ["GpuMemory", "read_gpu", "read_pss_bytes"]

_ROLLUP = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True)
class GpuMemory:
    """What was in use on a GPU, by whatever ran there, before a bundle was loaded and after its first prediction."""

    before: DeviceMemory
    ready: DeviceMemory

    @property
    def model_bytes(self) -> int | None:
        """What came in between; None where it was not measured, and below 0 where others gave more back."""
        if self.before.used_bytes is None or self.ready.used_bytes is None:
            return None
        return self.ready.used_bytes - self.before.used_bytes

    @property
    def problem(self) -> str | None:
        """Why it was not measured."""
        return self.before.problem or self.ready.problem


def read_gpu(number: int) -> DeviceMemory:
    """Ask the NVIDIA driver of this machine how much of a GPU's memory is in use."""
    name = DRIVER_LIBRARIES.get(platform.system())
    if name is None:
        return DeviceMemory(None, f"there is no CUDA on {platform.system()}")
    return read_device_memory(name, ctypes.CDLL, number)


def read_pss_bytes(rollup: Path = _ROLLUP) -> int | None:
    """The process's proportional set size (PSS) in bytes: pages it shares with others count in part.

    Args:
        rollup: where Linux tells it; a test passes its own.

    Returns:
        None where the system does not tell, as outside Linux.
    """
    try:
        text = rollup.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "Pss":
            return int(value.split()[0]) * 1024
    return None

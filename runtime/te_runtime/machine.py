"""What te_runtime asks the machine that it runs on; one seam, so that tests can be any machine."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import platform
from pathlib import Path
from types import ModuleType
from typing import Protocol

from te_runtime.cpu import Cpu, parse_cpuinfo
from te_runtime.cuda_driver import DRIVER_LIBRARIES, CudaDriver, read_driver
from te_runtime.elf import needed_libraries
from te_runtime.onnxruntime_install import import_onnxruntime, installed_onnxruntimes
from te_runtime.threads import usable_cpus

__all__ = ["LocalMachine", "Machine"]

_KERNEL_DRIVER = Path("/proc/driver/nvidia/version")
_CPUINFO = Path("/proc/cpuinfo")


class Machine(Protocol):
    """A machine; LocalMachine is the one this process runs on."""

    @property
    def system(self) -> str:
        """`Linux`, `Windows` or `Darwin`."""

    @property
    def library_path(self) -> str:
        """The environment's LD_LIBRARY_PATH, or PATH on Windows."""

    def distributions(self) -> dict[str, str]:
        """The installed distributions that bring onnxruntime → their versions."""

    def onnxruntime(self) -> ModuleType:
        """Import onnxruntime; raises ProviderError."""

    def cuda_needs(self) -> tuple[str, ...]:
        """File names of the libraries that onnxruntime's CUDA provider is linked against; none if unknown."""

    def load_library(self, name: str) -> object:
        """Load a library by name; raises OSError where the loader finds none."""

    def library_folders(self) -> tuple[Path, ...]:
        """The library folders of NVIDIA's Python packages beside onnxruntime."""

    def preload_cuda(self) -> str:
        """Have onnxruntime load CUDA libraries from those folders; what it had to say."""

    def driver(self) -> CudaDriver:
        """Ask the NVIDIA driver."""

    def kernel_driver(self) -> str | None:
        """The version of the NVIDIA driver in the kernel, as it tells it; None where there is none."""

    def probe(self, execution_provider: str, options: dict[str, str]) -> str | None:
        """Run a tiny graph there; why that does not work, or None."""

    def cpu(self) -> Cpu:
        """The CPU."""


class LocalMachine:
    """The machine that this process runs on."""

    @property
    def system(self) -> str:
        return platform.system()

    @property
    def library_path(self) -> str:
        return os.environ.get("PATH" if self.system == "Windows" else "LD_LIBRARY_PATH", "")

    def distributions(self) -> dict[str, str]:
        from importlib.metadata import version

        return {name: version(name) for name in installed_onnxruntimes()}

    def onnxruntime(self) -> ModuleType:
        return import_onnxruntime()

    def cuda_needs(self) -> tuple[str, ...]:
        if self.system != "Linux":
            return ()
        return needed_libraries(self._package() / "capi" / "libonnxruntime_providers_cuda.so")

    def load_library(self, name: str) -> object:
        return ctypes.CDLL(name)

    def library_folders(self) -> tuple[Path, ...]:
        return tuple(sorted((self._package().parent / "nvidia").glob("*/lib")))

    def preload_cuda(self) -> str:
        # It prints what fails; stdout belongs to the program's own answer.
        with contextlib.redirect_stdout(io.StringIO()) as said:
            self.onnxruntime().preload_dlls()
        return " ".join(said.getvalue().split())

    def driver(self) -> CudaDriver:
        name = DRIVER_LIBRARIES.get(self.system)
        if name is None:
            return CudaDriver(None, (), f"there is no CUDA on {self.system}")
        return read_driver(name, ctypes.CDLL)

    def kernel_driver(self) -> str | None:
        return _read(_KERNEL_DRIVER).partition("\n")[0].strip() or None

    def probe(self, execution_provider: str, options: dict[str, str]) -> str | None:
        from te_runtime.probe import probe_provider

        return probe_provider(self.onnxruntime(), execution_provider, options)

    def cpu(self) -> Cpu:
        return parse_cpuinfo(
            _read(_CPUINFO), architecture=platform.machine(), usable=usable_cpus(), total=os.cpu_count() or 1
        )

    def _package(self) -> Path:
        return Path(str(self.onnxruntime().__file__)).parent


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""

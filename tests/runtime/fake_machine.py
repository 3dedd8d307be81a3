"""Machines that are not this one: with a GPU, without, with something missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

from te_runtime.cpu import Cpu, parse_cpuinfo
from te_runtime.cuda_driver import CudaDevice, CudaDriver
from te_runtime.errors import ProviderError

GPU = CudaDevice(0, "NVIDIA Test GPU", 24 * 10**9, "9.0")
DRIVER = CudaDriver((13, 0), (GPU,), None)
NO_DRIVER = CudaDriver(None, (), "libcuda.so.1 does not load: no such file")
NEEDS = (
    "libcublasLt.so.13",
    "libcublas.so.13",
    "libcurand.so.10",
    "libcudart.so.13",
    "libcuda.so.1",
    "libc.so.6",
)


@dataclass
class FakeMachine:
    """A Linux machine on which CUDA works; each field changes one thing. Keeps what was asked of it."""

    system: str = "Linux"
    library_path: str = "/opt/lib"
    installed: dict[str, str] = field(default_factory=lambda: {"onnxruntime-gpu": "1.31.1"})
    built_in: tuple[str, ...] = ("CUDAExecutionProvider", "CPUExecutionProvider")
    cuda_version: str = "13.0"
    needs: tuple[str, ...] = NEEDS
    on_loader_path: frozenset[str] = frozenset((*NEEDS, "libcudnn.so.9"))
    folders: tuple[Path, ...] = ()
    driver_found: CudaDriver = DRIVER
    kernel: str | None = "NVRM version: NVIDIA UNIX x86_64 Kernel Module 580.65.06"
    problems: dict[str, str] = field(default_factory=dict)
    preload_said: str = ""
    asked: list[str] = field(default_factory=list)

    def distributions(self) -> dict[str, str]:
        return self.installed

    def onnxruntime(self) -> ModuleType:
        if not self.installed:
            raise ProviderError("onnxruntime is not installed. Install one of them: …")
        if len(self.installed) > 1:
            raise ProviderError("installed together. Run: pip uninstall -y …")
        return SimpleNamespace(
            __version__="1.31.1",
            cuda_version=self.cuda_version,
            get_available_providers=lambda: list(self.built_in),
        )

    def cuda_needs(self) -> tuple[str, ...]:
        return self.needs

    def load_library(self, name: str) -> object:
        if name not in self.on_loader_path:
            raise OSError(f"{name}: cannot open shared object file")
        return object()

    def library_folders(self) -> tuple[Path, ...]:
        return self.folders

    def preload_cuda(self) -> str:
        self.asked.append("preload")
        return self.preload_said

    def driver(self) -> CudaDriver:
        return self.driver_found

    def kernel_driver(self) -> str | None:
        return self.kernel

    def probe(self, execution_provider: str, options: dict[str, str]) -> str | None:
        self.asked.append(f"probe {execution_provider} {options}")
        return self.problems.get(execution_provider)

    def cpu(self) -> Cpu:
        text = "model name : Test CPU\nflags : fpu avx2 avx512f avx512_vnni\n"
        return parse_cpuinfo(text, architecture="x86_64", usable=2, total=4)

"""The CUDA libraries that ONNX Runtime's CUDA provider needs: which, where they were sought, which were found.

Two places are looked at, in this order: wherever the system's loader finds a library by its name (LD_LIBRARY_PATH,
the loader's cache, libraries that the process has loaded already), and the folders of NVIDIA's Python packages
beside onnxruntime, from which onnxruntime.preload_dlls() loads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LOADER", "CudaLibrary", "cuda_libraries", "seek_libraries"]

LOADER = "loader"

_TITLES = {
    "cublasLt": "cuBLASLt",
    "cublas": "cuBLAS",
    "cudart": "CUDA runtime",
    "cudnn": "cuDNN",
    "cufft": "cuFFT",
    "curand": "cuRAND",
    "nvrtc": "NVRTC",
}
_CUDNN = "libcudnn.so.9"
_NAME = re.compile(r"lib(\w+?)\.so(?:\.[\d.]+)?")


@dataclass(frozen=True)
class CudaLibrary:
    """One library.

    Attributes:
        title: its name among people, `cuBLAS`.
        file: the name that it is loaded by, with the version needed, `libcublas.so.13`.
        is_required: whether the provider does not load without it; the others are asked for by single
            operators.
        found: `loader`, the path of the file in a Python package, or None where it is missing.
    """

    title: str
    file: str
    is_required: bool
    found: str | None = None


def cuda_libraries(needed: Iterable[str]) -> tuple[CudaLibrary, ...]:
    """The CUDA libraries among those that the provider's file is linked against, and cuDNN.

    ONNX Runtime 1.31 loads cuDNN when an operator asks for it, convolutions for example (microsoft/onnxruntime,
    pull request 29252); older releases are linked against it.
    """
    required = [CudaLibrary(title, file, True) for file in needed if (title := _title(file))]
    if required and not any(library.title == _TITLES["cudnn"] for library in required):
        required.append(CudaLibrary(_TITLES["cudnn"], _CUDNN, False))
    return tuple(required)


def seek_libraries(
    libraries: Sequence[CudaLibrary], *, load: Callable[[str], object], folders: Sequence[Path]
) -> tuple[CudaLibrary, ...]:
    """Look for each library.

    Args:
        libraries: what to look for.
        load: loads a library by name and raises OSError where the loader finds none.
        folders: folders of Python packages that hold CUDA libraries.

    Returns:
        The same libraries with `found` filled in.
    """
    return tuple(
        CudaLibrary(library.title, library.file, library.is_required, _seek(library.file, load, folders))
        for library in libraries
    )


def _seek(file: str, load: Callable[[str], object], folders: Sequence[Path]) -> str | None:
    try:
        load(file)
    except OSError:
        return next((str(folder / file) for folder in folders if (folder / file).is_file()), None)
    return LOADER


def _title(file: str) -> str | None:
    match = _NAME.fullmatch(file)
    return _TITLES.get(match[1]) if match else None

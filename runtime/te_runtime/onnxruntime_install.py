"""ONNX Runtime as it is installed here: which distributions bring it, importing it, and what it raises."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType

from te_runtime.errors import ProviderError
from te_runtime.interrupts import was_interrupted

__all__ = ["import_onnxruntime", "installed_onnxruntimes", "onnxruntime_errors"]

_INSTALL = (
    "Install one of them: pip install 'te-runtime[cpu]' for any machine, "
    "pip install 'te-runtime[gpu]' for NVIDIA GPUs."
)
# Every one of these installs the same import package, onnxruntime, over the others'.
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")


def installed_onnxruntimes() -> tuple[str, ...]:
    """The installed distributions that bring the package `onnxruntime`.

    Looks for their metadata folders where Python finds the package; importlib.metadata would take 30 ms of every
    start to say the same.
    """
    found: set[str] = set()
    for folder in sys.path:
        try:
            entries = os.listdir(folder or ".") if os.path.isdir(os.path.join(folder, "onnxruntime")) else ()
        except OSError:
            continue
        found.update(
            entry.partition("-")[0].replace("_", "-") for entry in entries if entry.endswith(".dist-info")
        )
    return tuple(name for name in _DISTRIBUTIONS if name in found)


def import_onnxruntime(
    installed: Callable[[], tuple[str, ...]] = installed_onnxruntimes,
    load: Callable[[str], ModuleType] = importlib.import_module,
) -> ModuleType:
    """Import onnxruntime, or say what is wrong with how it is installed.

    Args:
        installed: tells the installed distributions; a test passes its own.
        load: imports a module by name; a test passes its own.

    Raises:
        ProviderError: it is missing, installed twice, or does not load.
    """
    distributions = installed()
    if len(distributions) > 1:
        raise ProviderError(
            f"{' and '.join(distributions)} are installed together and overwrite each other's files. "
            f"Run: pip uninstall -y {' '.join(distributions)}. {_INSTALL}"
        )
    try:
        module = load("onnxruntime")
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise ProviderError(
                f"onnxruntime does not load, package {error.name!r} is missing. {_INSTALL}"
            ) from error
        raise ProviderError(f"onnxruntime is not installed. {_INSTALL}") from error
    except (ImportError, OSError) as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from error
        raise ProviderError(
            f"onnxruntime is installed but does not load: {error}. "
            f"Run: pip install --force-reinstall {' '.join(distributions) or 'onnxruntime'}"
        ) from error
    if not hasattr(module, "InferenceSession"):
        raise ProviderError(
            f"onnxruntime is installed in part: it has no InferenceSession. "
            f"Run: pip uninstall -y {' '.join(distributions) or 'onnxruntime'}. {_INSTALL}"
        )
    return module


def onnxruntime_errors(ort: ModuleType) -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own classes have no common base but Exception."""
    state = vars(ort.capi.onnxruntime_pybind11_state)
    own = [value for value in state.values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*own, RuntimeError, ValueError, MemoryError)

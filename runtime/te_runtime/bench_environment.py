"""What a benchmark ran on: the machine, how busy it was, and the versions of what took part."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from te_runtime.cpu import Cpu
from te_runtime.doctor import own_version
from te_runtime.machine import LocalMachine, Machine

__all__ = ["Environment", "read_environment"]


@dataclass(frozen=True)
class Environment:
    """A machine and its software.

    Attributes:
        cpu: the CPU.
        system: for example `Linux-6.8-x86_64`.
        python: version.
        te_runtime: version, or None where it is not installed as a package.
        onnxruntime: version of the package that runs the graphs.
        distributions: what brings it → version.
        load_average: processes that wanted a CPU in the last minute, before the benchmark; None where the
            system does not tell.
    """

    cpu: Cpu
    system: str
    python: str
    te_runtime: str | None
    onnxruntime: str
    distributions: dict[str, str]
    load_average: float | None


def read_environment(machine: Machine | None = None) -> Environment:
    """Look at this machine, or at the one that a test passes.

    Raises:
        ProviderError: onnxruntime is missing or does not load.
    """
    place = machine or LocalMachine()
    return Environment(
        cpu=place.cpu(),
        system=platform.platform(),
        python=platform.python_version(),
        te_runtime=own_version(),
        onnxruntime=str(place.onnxruntime().__version__),
        distributions=place.distributions(),
        load_average=_load_average(),
    )


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none
        return None

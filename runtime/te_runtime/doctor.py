"""What this machine has for running bundles, what is missing, and what fixes it; `te-runtime doctor` prints it."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from te_runtime.cpu import Cpu
from te_runtime.cuda_check import CudaReport, Finding, check_cuda
from te_runtime.errors import ProviderError
from te_runtime.machine import LocalMachine, Machine

__all__ = ["Doctor", "OnnxRuntime", "examine", "own_version"]


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime as it is installed.

    Attributes:
        distributions: what brings it → version; two at once are broken.
        version: what the imported package calls itself; None if it does not load.
        built_in: the execution providers compiled in, whether or not they work here.
        problem: why it does not load, and what fixes it; None if it loads.
    """

    distributions: dict[str, str]
    version: str | None
    built_in: tuple[str, ...]
    problem: str | None


@dataclass(frozen=True)
class Doctor:
    """Everything that was looked at.

    Attributes:
        te_runtime: version, or None where it is not installed as a package.
        python: version.
        system: for example `Linux-6.8-x86_64`.
        cpu: the CPU.
        onnxruntime: how it is installed.
        cpu_problem: why the CPU provider does not run a graph; None if it does.
        cuda: what CUDA needs and has; None where onnxruntime does not load.
        not_looked_at: what this release cannot look at on this system.
        works: the providers that ran a graph, fastest first; the one `auto` takes stands first.
        findings: what is wrong, each with what fixes it.
    """

    te_runtime: str | None
    python: str
    system: str
    cpu: Cpu
    onnxruntime: OnnxRuntime
    cpu_problem: str | None
    cuda: CudaReport | None
    not_looked_at: tuple[str, ...]
    works: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def can_run(self) -> bool:
        """Whether bundles run here at all."""
        return "cpu" in self.works


def examine(machine: Machine | None = None) -> Doctor:
    """Look at this machine; runs a graph of one node on each provider that might work.

    Args:
        machine: where to look; a test passes its own.
    """
    place = machine or LocalMachine()
    onnxruntime = _examine_onnxruntime(place)
    cpu_problem, cuda = onnxruntime.problem, None
    findings: list[Finding] = []
    if onnxruntime.problem is None:
        cpu_problem = place.probe("CPUExecutionProvider", {})
        if cpu_problem is not None:
            fix = f"Run: pip install --force-reinstall {' '.join(onnxruntime.distributions) or 'onnxruntime'}"
            findings.append(Finding(f"a graph of one node does not run on the CPU: {cpu_problem}", fix))
        cuda = check_cuda(place)
        findings += cuda.findings
    else:
        problem, _, fix = onnxruntime.problem.partition(". ")
        findings.append(Finding(problem, fix))
    works = [
        name
        for name, does in (("cuda", cuda is not None and cuda.has_run), ("cpu", cpu_problem is None))
        if does
    ]
    return Doctor(
        te_runtime=own_version(),
        python=platform.python_version(),
        system=platform.platform(),
        cpu=place.cpu(),
        onnxruntime=onnxruntime,
        cpu_problem=cpu_problem,
        cuda=cuda,
        not_looked_at=_not_looked_at(place.system),
        works=tuple(works),
        findings=tuple(findings),
    )


def _examine_onnxruntime(machine: Machine) -> OnnxRuntime:
    distributions = machine.distributions()
    try:
        ort = machine.onnxruntime()
    except ProviderError as error:
        return OnnxRuntime(distributions, None, (), str(error))
    return OnnxRuntime(distributions, str(ort.__version__), tuple(ort.get_available_providers()), None)


def _not_looked_at(system: str) -> tuple[str, ...]:
    if system == "Linux":
        return ()
    parts = ["which CUDA libraries are found (only whether a graph runs)"] if system == "Windows" else []
    return (*parts, "CPU features")


def own_version() -> str | None:
    """The version of te_runtime, or None where it is not installed as a package."""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("te-runtime", "te-export"):  # te-export ships the same package
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None

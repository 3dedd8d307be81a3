"""Execution providers: the one asked for is the one that runs, or a ProviderError says what is missing.

`auto` takes CUDA where a graph really runs on it and the CPU elsewhere, and says which and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from te_runtime.choices import parse_choice
from te_runtime.errors import InputError, ProviderError

if TYPE_CHECKING:
    from te_runtime.machine import Machine

__all__ = [
    "CudaOptions",
    "Provider",
    "ProviderChoice",
    "ProviderName",
    "choose_provider",
    "execution_provider",
    "parse_provider",
]

Provider = Literal["cpu", "cuda"]
ProviderName = Literal["cpu", "cuda", "auto"]

_NAMES: tuple[ProviderName, ...] = ("cpu", "cuda", "auto")
_EXECUTION_PROVIDERS: dict[Provider, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
MAX_GRAPH_BATCH_SIZES = 64


@dataclass(frozen=True)
class CudaOptions:
    """How to run on CUDA.

    Attributes:
        device_id: which GPU, from 0.
        graph_batch_sizes: batch sizes to record as CUDA graphs. A recorded batch is replayed with one launch
            instead of one per node; each keeps buffers of its own on the device, and calls take turns.
    """

    device_id: int = 0
    graph_batch_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if type(self.device_id) is not int or self.device_id < 0:
            raise InputError(f"device_id: found {self.device_id!r:.80}, expected a whole number from 0")
        sizes = self.graph_batch_sizes
        if not isinstance(sizes, tuple) or not all(type(size) is int and size > 0 for size in sizes):
            raise InputError(f"graph_batch_sizes: found {sizes!r:.80}, expected a tuple of numbers from 1")
        if len(set(sizes)) != len(sizes) or len(sizes) > MAX_GRAPH_BATCH_SIZES:
            raise InputError(
                f"graph_batch_sizes: found {sizes!r:.80}, expected each once and {MAX_GRAPH_BATCH_SIZES} at most"
            )


class ProviderChoice(NamedTuple):
    """Where a model runs.

    Attributes:
        asked: what the caller asked for.
        provider: what runs.
        reason: why, in one sentence.
        device: the GPU's name; None on the CPU.
    """

    asked: ProviderName
    provider: Provider
    reason: str
    device: str | None


def parse_provider(name: str) -> ProviderName:
    """The provider that a user named.

    Raises:
        ProviderError: there is no such provider.
    """
    return parse_choice("provider", name, _NAMES, ProviderError)


def execution_provider(provider: Provider) -> str:
    """ONNX Runtime's own name for a provider."""
    return _EXECUTION_PROVIDERS[provider]


def choose_provider(
    name: str, *, cuda: CudaOptions | None = None, machine: Machine | None = None
) -> ProviderChoice:
    """Decide where to run, and make sure that it runs there.

    For `cpu` nothing is looked at. Otherwise the CUDA libraries are loaded and a graph of one node is run.

    Args:
        name: `cpu`, `cuda` or `auto`.
        cuda: which GPU.
        machine: where to look; a test passes its own.

    Raises:
        InputError: CUDA is described and the CPU asked for.
        ProviderError: there is no such provider, or CUDA was asked for and something is missing.
    """
    asked = parse_provider(name)
    if cuda is not None and (asked == "cpu" or not isinstance(cuda, CudaOptions)):
        raise InputError(
            f"cuda: found {cuda!r:.80} with provider {asked!r}, expected CudaOptions, and provider 'cuda' or 'auto'"
        )
    if asked == "cpu":
        return ProviderChoice(asked, "cpu", "asked for", None)
    from te_runtime.cuda_check import check_cuda
    from te_runtime.machine import LocalMachine

    device_id = (cuda or CudaOptions()).device_id
    report = check_cuda(machine or LocalMachine(), device_id)
    if report.has_run:
        device = report.driver.devices[device_id].name
        choice = ProviderChoice(asked, "cuda", "asked for", device)
        return choice if asked == "cuda" else choice._replace(reason=f"a graph ran on {device}")
    if asked == "auto":
        return ProviderChoice(asked, "cpu", f"no CUDA here: {report.findings[0].problem}", None)
    first, *others = report.findings
    more = f" And {len(others)} more:" if others else ""
    raise ProviderError(
        f"provider 'cuda' does not work here: {first}{more} te-runtime doctor shows everything that was looked at."
    )

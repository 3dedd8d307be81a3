"""The options that several commands of te-runtime share, and what they say to load()."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from te_runtime.errors import InputError
from te_runtime.providers import CudaOptions, ProviderName
from te_runtime.threads import MAX_THREADS

__all__ = ["choose_cuda", "load_options", "report_options"]

Command = TypeVar("Command", bound=Callable[..., object])

_REPORT_OPTIONS = (
    click.option("-v", "--verbose", is_flag=True, expose_value=False, help="Show tracebacks of errors."),
    click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print one JSON object on standard output and nothing else there.",
    ),
)
_LOAD_OPTIONS = (
    click.option(
        "--threads",
        type=click.IntRange(1, MAX_THREADS),
        metavar="N",
        help="CPU threads.  [default: half of the CPUs, at most four]",
    ),
    click.option(
        "--device",
        type=click.IntRange(0),
        metavar="N",
        help="Number of the GPU, with provider cuda or auto.  [default: 0]",
    ),
    click.option(
        "--provider",
        metavar="NAME",
        default="cpu",
        show_default=True,
        help="Where to run: cpu, cuda, or auto for cuda where it works.",
    ),
    click.option(
        "--precision",
        metavar="NAME",
        help="Which variant to run, such as fp32.  [default: the bundle's first, or fp16 on CUDA where there "
        "is one]",
    ),
)


def report_options(command: Command) -> Command:
    """--json, and -v, which the group looks for itself."""
    for option in _REPORT_OPTIONS:
        command = option(command)
    return command


def load_options(command: Command) -> Command:
    """The options of commands that load the model."""
    for option in _LOAD_OPTIONS:
        command = option(command)
    return command


def choose_cuda(provider: ProviderName, device: int | None) -> CudaOptions | None:
    """What --device says of the GPU.

    Raises:
        InputError: a GPU is named and the CPU asked for.
    """
    if device is None:
        return None
    if provider == "cpu":
        raise InputError(
            f"--device {device} names a GPU, but the provider is cpu: pass --provider cuda too, or leave "
            "--device out"
        )
    return CudaOptions(device_id=device)

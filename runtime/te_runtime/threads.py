"""How many CPU threads a run may use, and how many CPUs this process has, which containers and taskset make fewer."""

from __future__ import annotations

import os

from te_runtime.choices import parse_number
from te_runtime.errors import InputError

__all__ = ["MAX_THREADS", "default_threads", "parse_spinning", "parse_threads", "usable_cpus"]

MAX_THREADS = 1024
MAX_DEFAULT_THREADS = 4


def usable_cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """Half of the CPUs this process may use, at least one and at most four.

    Most machines count two CPUs per core, and small graphs gain nothing from more than four.
    """
    return max(1, min(MAX_DEFAULT_THREADS, usable_cpus() // 2))


def parse_threads(threads: int | None) -> int:
    """The number of threads to use.

    Raises:
        InputError: `threads` is not a whole number from 1 to 1024.
    """
    if threads is None:
        return default_threads()
    return parse_number("threads", threads, 1, MAX_THREADS)


def parse_spinning(spinning: bool) -> bool:
    """Whether threads may turn in circles while they wait.

    Raises:
        InputError: it is neither True nor False.
    """
    if type(spinning) is not bool:
        raise InputError(f"spinning: found {spinning!r:.80}, expected True or False")
    return spinning

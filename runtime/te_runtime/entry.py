"""The console script te-runtime: signals are heard from the first line on, before anything heavy is imported."""

from __future__ import annotations

import signal
import sys
from types import FrameType

__all__ = ["main"]

_INTERRUPTED = 130


def main() -> None:
    """Run the command line. SIGTERM and SIGHUP unwind like Ctrl-C, so that unfinished files are removed."""
    try:
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), _interrupt)
        from te_runtime.cli import main as run

        run(prog_name="te-runtime")  # tells an interrupt itself, unless one hits it while it prints
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt

"""The outermost frame of every te-export command: signals, exit codes, and errors without tracebacks.

A command returns an Outcome and prints nothing itself, so that one place knows whether printing worked.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NamedTuple, NoReturn

import click

from te_export.errors import DependencyError, TeExportError
from te_runtime.errors import TeRuntimeError
from te_runtime.interrupts import was_interrupted

__all__ = ["Outcome", "importing", "run_program"]

_INTERRUPTED = 130
_BROKEN_PIPE = 141
_CANNOT_PRINT = 74
_INTERNAL_ERROR = 70


class Outcome(NamedTuple):
    """What a command that is done has to say on standard output, its exit code, and errors to tell of after it."""

    text: str
    exit_code: int = 0
    errors: tuple[str, ...] = ()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Tell a package that cannot be imported as what it is.

    Raises:
        DependencyError: a package is missing or broken.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"the package {error.name!r} is missing. Install everything that te-export needs: pip install "
            "'.' "
            "in its source folder"
        ) from error
    except (ImportError, OSError) as error:
        raise DependencyError(
            f"a package that te-export needs is broken: {error}. Install it again: pip install "
            "--force-reinstall"
        ) from error


def run_program(
    command: click.Command, arguments: Sequence[str], *, prog_name: str, interrupted: str
) -> NoReturn:
    """Run a command and exit: every outcome becomes an exit code, and no error shows a traceback without -v.

    Args:
        command: returns an Outcome, or None for help and the version, which click prints.
        arguments: without the program's name.
        prog_name: how usage lines begin.
        interrupted: what to tell after Ctrl-C, SIGTERM or SIGHUP.
    """
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupt)
    try:
        outcome = command.main(args=list(arguments), prog_name=prog_name, standalone_mode=False)
    except (TeExportError, TeRuntimeError) as error:
        _fail(str(error), error, error.exit_code, arguments)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        usage = f"{context.get_usage()}\nTry '{prog_name} --help' for help.\n" if context is not None else ""
        _fail(error.format_message(), error, error.exit_code, arguments, before=usage)
    except (click.Abort, KeyboardInterrupt) as error:
        _fail(interrupted, error, _INTERRUPTED, arguments)
    except Exception as error:  # noqa: BLE001 - the outermost frame: whatever is left is a defect of ours
        if was_interrupted(error):
            _fail(interrupted, error, _INTERRUPTED, arguments)
        message = f"internal error, {type(error).__name__}: {error}. Please report it with what -v prints."
        _fail(message, error, _INTERNAL_ERROR, arguments)
    if not isinstance(outcome, Outcome):  # --help and --version
        sys.exit(_print(""))
    printed = _print(outcome.text)
    for reason in outcome.errors:
        click.echo(f"error: {reason}", err=True)
    sys.exit(printed or outcome.exit_code)


def _print(text: str) -> int:
    """Print the result of a command that is done, and give the exit code.

    click itself would end with 1 where a pipe is closed early, which says that a check failed.
    """
    try:
        if text:
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            click.echo(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        click.echo(f"error: all is done, but the result could not be printed: {error}", err=True)
        return _CANNOT_PRINT
    return 0


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP unwind like Ctrl-C, so that staged files are removed."""
    raise KeyboardInterrupt


def _fail(
    message: str, error: BaseException, code: int, arguments: Sequence[str], *, before: str = ""
) -> NoReturn:
    if any(re.fullmatch(r"--verbose|-[qh]*v[qvh]*", argument) for argument in arguments):
        traceback.print_exception(error)
    if sys.stderr.isatty():
        click.echo("\r\x1b[2K", nl=False, err=True)
    click.echo(f"{before}error: {message}", err=True)
    if "--json" in arguments:
        told = {"status": "error", "error": type(error).__name__, "message": message, "exit_code": code}
        with contextlib.suppress(OSError):  # standard output is full or closed; the exit code still tells
            click.echo(json.dumps(told))
    sys.exit(code)

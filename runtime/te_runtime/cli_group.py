"""The group of te-runtime's commands: prints what a command answers, and maps errors to exit codes.

A command returns an Outcome and prints nothing itself, so that one place knows whether printing worked.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import click

from te_runtime.errors import TeRuntimeError
from te_runtime.interrupts import was_interrupted

if TYPE_CHECKING:
    from te_runtime.describe import Json

__all__ = ["CommandGroup", "Outcome", "json_outcome", "text_outcome"]

_INTERNAL_ERROR = 70
_CANNOT_PRINT = 74
_INTERRUPTED = 130
_BROKEN_PIPE = 141


@dataclass(frozen=True)
class Outcome:
    """What a command has to say on standard output, and its exit code."""

    text: str
    exit_code: int


def text_outcome(lines: Iterable[str], exit_code: int = 0) -> Outcome:
    """Lines for people."""
    return Outcome("".join(f"{line}\n" for line in lines), exit_code)


def json_outcome(value: Mapping[str, Json], exit_code: int = 0) -> Outcome:
    """One JSON object for programs; `status` is `ok`, or `failed` where the exit code is not 0."""
    return _object({"status": "failed" if exit_code else "ok", "exit_code": exit_code, **value}, exit_code)


class CommandGroup(click.Group):
    """A click group whose commands return an Outcome.

    Run as a program (standalone_mode), it prints what they return and exits; an error becomes a message on
    standard error, with --json also an object on standard output, and never shows a traceback without -v.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,  # click's own signature, which hands them through
    ) -> Any:
        """As click.Command.main."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        printed = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="", write_through=True)
        try:
            with contextlib.redirect_stdout(printed):  # click prints the help, and completions for a shell
                found = super().main(args, prog_name, complete_var, False, **extra)
        except SystemExit as end:  # completions are there
            found = end.code
        except Exception as error:  # noqa: BLE001 - the outermost frame: whatever is left is a defect of ours
            found = _failure(error, sys.argv[1:] if args is None else args)
        outcome = found if isinstance(found, Outcome) else Outcome("", int(found or 0))
        printed.seek(0)
        sys.exit(_print(printed.read() + outcome.text, outcome.exit_code))


def _failure(error: Exception, arguments: Sequence[str]) -> Outcome:
    """Tell an error on standard error, and in the Outcome if --json was among the arguments."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    message, exit_code = _explain(error)
    if any(re.fullmatch(r"--verbose|-v+", option) for option in options):
        _write(sys.stderr, "".join(traceback.format_exception(error)))
    context = error.ctx if isinstance(error, click.UsageError) else None
    usage = (
        f"{context.get_usage()}\nTry '{context.command_path} --help' for help.\n"
        if context is not None
        else ""
    )
    _write(sys.stderr, f"{usage}error: {message}\n")
    if "--json" not in options:
        return Outcome("", exit_code)
    told: dict[str, Json] = {
        "status": "error",
        "error": type(error).__name__,
        "message": message,
        "exit_code": exit_code,
    }
    return _object(told, exit_code)


def _explain(error: Exception) -> tuple[str, int]:
    """An error's message and exit code."""
    if isinstance(error, TeRuntimeError):
        return str(error), error.exit_code
    if isinstance(error, click.ClickException):
        return error.format_message(), error.exit_code
    if isinstance(error, click.Abort) or was_interrupted(error):  # click makes Abort of KeyboardInterrupt
        return "interrupted; no file was left half written", _INTERRUPTED
    told = f"internal error, {type(error).__name__}: {error}. Please report it with what -v prints."
    return told, _INTERNAL_ERROR


def _object(value: dict[str, Json], exit_code: int) -> Outcome:
    return Outcome(json.dumps(value, indent=2, allow_nan=False) + "\n", exit_code)


def _print(text: str, exit_code: int) -> int:
    """Print what a command answered, and give the exit code; a failed one outweighs a failed print."""
    error = _write(sys.stdout, text)
    if error is None:
        return exit_code
    if error.errno == errno.EPIPE:
        return exit_code or _BROKEN_PIPE
    advice = "Send standard output to a file or program that can take it."
    _write(sys.stderr, f"error: the result could not be printed: {error.strerror}. {advice}\n")
    return exit_code or _CANNOT_PRINT


def _write(stream: TextIO | None, text: str) -> OSError | None:
    """Write and flush. A stream that fails leads nowhere from then on: CPython flushes it once more as it ends,
    and would complain again and change the exit code.
    """
    if stream is None:
        return OSError(errno.EBADF, "standard output is closed")
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None

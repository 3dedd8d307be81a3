"""The command `te-runtime`. What is heavy is imported by the command that uses it, not for --help."""

from __future__ import annotations

import json
import shlex
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from te_runtime.errors import TeRuntimeError

if TYPE_CHECKING:
    from te_runtime.describe import Json

__all__ = ["main"]

INTERRUPTED_EXIT_CODE = 130
MISMATCH_EXIT_CODE = 1
NOTHING_WORKS_EXIT_CODE = 3

_VERBOSE = "te_runtime.verbose"
_JSON = "te_runtime.json"

Command = TypeVar("Command", bound=Callable[..., None])


class _Group(click.Group):
    """Maps te_runtime's errors to one line on stderr and their exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TeRuntimeError as error:
            if ctx.meta.get(_VERBOSE):
                traceback.print_exc()
            click.echo(f"error: {error}", err=True)
            if ctx.meta.get(_JSON):
                _print_json({"error": {"type": type(error).__name__, "message": str(error)}})
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            ctx.exit(INTERRUPTED_EXIT_CODE)


def _common_options(command: Command) -> Command:
    """--json and -v, which the error handling has to know as well."""
    command = click.option(
        "--json",
        "as_json",
        is_flag=True,
        callback=_remember(_JSON),
        help="Print one JSON object and nothing else.",
    )(command)
    return click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=_remember(_VERBOSE),
        help="After an error, show the Python traceback too.",
    )(command)


def _remember(key: str) -> Callable[[click.Context, click.Parameter, bool], bool]:
    def callback(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
        ctx.meta[key] = value
        return value

    return callback


def _run_options(command: Command) -> Command:
    """The options of commands that load the model."""
    for option in (
        click.option("--threads", type=int, help="CPU threads; default: half of the CPUs, at most four."),
        click.option(
            "--provider",
            default="cpu",
            show_default=True,
            help="Where to run: cpu, cuda, or auto for cuda where it works.",
        ),
        click.option(
            "--precision", help="Which variant to run, for example fp32; default: the bundle's first."
        ),
    ):
        command = option(command)
    return command


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    for name in ("te-runtime", "te-export"):  # te-export ships the same package
        try:
            click.echo(f"te-runtime {version(name)}")
            ctx.exit()
        except PackageNotFoundError:
            continue
    click.echo("te-runtime (not installed as a package)")
    ctx.exit()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show it."
)
def main() -> None:
    """Look into, check and run a model bundle made by te-export.

    A bundle is a folder. It holds a model that answers several tasks from one input, ready for ONNX Runtime.

    \b
    te-runtime inspect model-onnx           what is in it, and is it whole
    te-runtime verify model-onnx            does it give the right numbers on this machine
    te-runtime run model-onnx input.npz     predictions for your own rows
    te-runtime doctor                       what works on this machine, and what fixes the rest

    Exit codes: 0 done; 1 verify found wrong numbers; 2 bad usage, bundle or input; 3 ONNX Runtime or the
    provider is missing.
    """


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@_common_options
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE holds: tasks, inputs, variants, and whether every file is unchanged.

    Needs no ONNX Runtime.
    """
    from te_runtime.bundle import open_bundle
    from te_runtime.describe import bundle_json, bundle_text

    opened = open_bundle(bundle)
    if as_json:
        _print_json(bundle_json(opened))
        return
    _print_lines(bundle_text(opened))
    click.echo(f"Next: te-runtime verify {shlex.quote(str(bundle))}")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@_run_options
@_common_options
@click.pass_context
def verify(
    ctx: click.Context, bundle: Path, precision: str | None, provider: str, threads: int | None, as_json: bool
) -> None:
    """Run the test rows stored in BUNDLE on this machine and compare with the answers stored beside them.

    Exits with 1 if any value is farther off than the bundle allows.
    """
    from te_runtime.describe import shown_choice, verify_json, verify_text
    from te_runtime.predictor import load
    from te_runtime.providers import parse_provider

    with load(bundle, provider=parse_provider(provider), precision=precision, threads=threads) as model:
        choice, report = model.provider_choice, model.verify()
    if as_json:
        _print_json(verify_json(report))
    else:
        _print_lines(verify_text(str(bundle), report))
        click.echo(f"Ran {shown_choice(choice)}")
        click.echo(
            f"Next: te-runtime run {shlex.quote(str(bundle))} input.npz"
            if report.ok
            else "This bundle must not be used here."
        )
    if not report.ok:
        ctx.exit(MISMATCH_EXIT_CODE)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("input_file", metavar="INPUT", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Default: INPUT-predictions.npz beside INPUT."
)
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="Only this task; may be given again.")
@click.option("--force", is_flag=True, help="Overwrite the output file.")
@_run_options
@_common_options
def run(
    bundle: Path,
    input_file: Path,
    output: Path | None,
    tasks: tuple[str, ...],
    force: bool,
    precision: str | None,
    provider: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Predict for the rows in INPUT and write the answers to a .npz file.

    INPUT is a .npy file, or a .npz file with an array for each input of the model, rows first. The output
    holds TASK.prediction, and TASK.routing_weights where the model has them, for every task.
    """
    from te_runtime.arrays_io import check_output_path, default_output_path, read_inputs, write_predictions
    from te_runtime.describe import run_json, run_text
    from te_runtime.predictor import load
    from te_runtime.providers import parse_provider

    chosen = default_output_path(input_file) if output is None else output
    check_output_path(chosen, force=force)
    with load(bundle, provider=parse_provider(provider), precision=precision, threads=threads) as model:
        choice = model.provider_choice
        predictions = model.predict(read_inputs(input_file, model.inputs), tasks or None)
    write_predictions(chosen, predictions, force=force)
    if as_json:
        _print_json(run_json(predictions, chosen, choice))
    else:
        _print_lines(run_text(predictions, chosen, choice))


@main.command()
@_common_options
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show what this machine has for running bundles, what is missing, and the command that fixes it.

    Looks at ONNX Runtime, the CPU, and what CUDA needs, and runs a tiny graph on each. Exits with 3 if not even
    the CPU works.
    """
    from te_runtime.doctor import examine
    from te_runtime.doctor_text import doctor_json, doctor_text

    found = examine()
    if as_json:
        _print_json(doctor_json(found))
    else:
        _print_lines(doctor_text(found))
    if not found.can_run:
        ctx.exit(NOTHING_WORKS_EXIT_CODE)


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def _print_json(value: dict[str, Json]) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))

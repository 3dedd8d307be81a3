"""The command `te-runtime`. What is heavy is imported by the command that uses it, not for --help."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import get_args

import click

from te_runtime.cli_bench import bench
from te_runtime.cli_group import CommandGroup, Outcome, json_outcome, text_outcome
from te_runtime.cli_options import choose_cuda, load_options, report_options
from te_runtime.plan import Mode

__all__ = ["main"]

MISMATCH_EXIT_CODE = 1
NOTHING_WORKS_EXIT_CODE = 3


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


@click.group(
    cls=CommandGroup,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExit codes:\n"
    "  0    done\n"
    "  1    verify found wrong numbers\n"
    "  2    wrong usage, or a bundle or input that cannot be used\n"
    "  3    ONNX Runtime or the provider is missing\n"
    "  70   a defect of te-runtime, please report it\n"
    "  74   done, but the result could not be printed\n"
    "  130  interrupted\n"
    "  141  done, but nobody read the result: the pipe was closed",
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show it."
)
def main() -> None:
    """Look into, check, run and measure a model bundle made by te-export.

    A bundle is a folder. It holds a model that answers several tasks from one input, ready for ONNX Runtime.

    \b
    Examples:
      te-runtime inspect model-onnx
      te-runtime verify model-onnx --provider auto
      te-runtime run model-onnx input.npz --task click -o answers.npz
      te-runtime bench model-onnx
    """


@main.command(short_help="What is in a bundle, and is every file unchanged.")
@click.argument("bundle", type=click.Path(path_type=Path))
@report_options
def inspect(bundle: Path, as_json: bool) -> Outcome:
    """Show what BUNDLE holds: tasks, inputs, variants, and whether every file is unchanged.

    Needs no ONNX Runtime.
    """
    from te_runtime.bundle import open_bundle
    from te_runtime.describe import bundle_json, bundle_text

    opened = open_bundle(bundle)
    if as_json:
        return json_outcome(bundle_json(opened))
    return text_outcome([*bundle_text(opened), f"Next: te-runtime verify {shlex.quote(str(bundle))}"])


@main.command(short_help="Does a bundle give the right numbers on this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@load_options
@report_options
def verify(
    bundle: Path, precision: str | None, provider: str, device: int | None, threads: int | None, as_json: bool
) -> Outcome:
    """Run the golden rows stored in BUNDLE on this machine, through every graph, and compare with the answers
    stored beside them.

    Exits with 1 if any value is farther off than the bundle allows.
    """
    from te_runtime.predictor import load
    from te_runtime.providers import parse_provider
    from te_runtime.verify_text import verify_json, verify_text

    asked = parse_provider(provider)
    cuda = choose_cuda(asked, device)
    with load(bundle, provider=asked, precision=precision, threads=threads, cuda=cuda) as model:
        choice, report = model.provider_choice, model.verify()
    exit_code = 0 if report.ok else MISMATCH_EXIT_CODE
    if as_json:
        return json_outcome(verify_json(report, choice), exit_code)
    advice = f"Next: te-runtime run {shlex.quote(str(bundle))} input.npz"
    if not report.ok:
        advice = "This bundle must not be used here."
    return text_outcome([*verify_text(str(bundle), report, choice), advice], exit_code)


@main.command(short_help="Predictions for your own rows, as an .npz file.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("input_file", metavar="INPUT", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where predictions go.  [default: INPUT-predictions.npz beside INPUT]",
)
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="Only this task; repeat for more.")
@click.option("--force", is_flag=True, help="Overwrite the output file.")
@click.option(
    "--mode",
    type=click.Choice(get_args(Mode)),
    help="Which graphs to open: joint, one for all tasks; split, the trunk and a tail per task; task, one per "
    "task; pruned, one per task without the experts it hardly uses, if the bundle has any.  "
    "[default: split, or joint for a single task]",
)
@load_options
@report_options
def run(
    bundle: Path,
    input_file: Path,
    output: Path | None,
    tasks: tuple[str, ...],
    force: bool,
    mode: Mode | None,
    precision: str | None,
    provider: str,
    device: int | None,
    threads: int | None,
    as_json: bool,
) -> Outcome:
    """Predict for the rows in INPUT and write the answers to a .npz file.

    INPUT is a .npy file, or a .npz file with an array for each input of the model, rows first. The output
    holds TASK.prediction, and TASK.routing_weights where the model has them, for every task.
    """
    from te_runtime import arrays_io
    from te_runtime.predictor import load
    from te_runtime.providers import parse_provider
    from te_runtime.run_text import RunReport, run_json, run_text

    asked = parse_provider(provider)
    cuda = choose_cuda(asked, device)
    chosen = arrays_io.default_output_path(input_file) if output is None else output
    arrays_io.check_output_spares(chosen, bundle=bundle, input_file=input_file)
    arrays_io.check_output_path(chosen, force=force)
    with load(bundle, provider=asked, precision=precision, threads=threads, mode=mode, cuda=cuda) as model:
        predictions = model.predict(arrays_io.read_inputs(input_file, model.inputs), tasks or None)
        report = RunReport(
            predictions=predictions,
            output=chosen,
            precision=model.precision,
            choice=model.provider_choice,
            plan=model.plan,
            utilization=model.utilization(),
        )
    arrays_io.write_predictions(chosen, predictions, force=force)
    return json_outcome(run_json(report)) if as_json else text_outcome(run_text(report))


main.add_command(bench)


@main.command(short_help="What works on this machine, and what fixes the rest.")
@report_options
def doctor(as_json: bool) -> Outcome:
    """Show what this machine has for running bundles, what is missing, and the command that fixes it.

    Looks at ONNX Runtime, the CPU, and what CUDA needs, and runs a tiny graph on each. Exits with 3 if not even
    the CPU works.
    """
    from te_runtime.doctor import examine
    from te_runtime.doctor_text import doctor_json, doctor_text

    found = examine()
    exit_code = 0 if found.can_run else NOTHING_WORKS_EXIT_CODE
    return (
        json_outcome(doctor_json(found), exit_code)
        if as_json
        else text_outcome(doctor_text(found), exit_code)
    )

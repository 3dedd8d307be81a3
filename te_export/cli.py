"""The te-export command: parses, calls te_export.export once, and says what to print; cli_frame.py does the rest.

`te-export diff` is a command of its own (cli_diff.py), told by the first argument: every other first argument is an
option or a checkpoint, as it always was.

Imports nothing heavy, so that --help answers at once; torch comes with the first export.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import get_args

import click

from te_export.cli_frame import Outcome, importing, run_program
from te_export.options import ExportOptions, ExportResult, OptimizeLevel, Precision, TargetProvider
from te_export.progress import Progress, SilentProgress
from te_export.version import VERSION

__all__ = ["command", "main"]

_INTERRUPTED_MESSAGE = "interrupted; the output folder is as it was, or already holds the whole new bundle"
_DIFF = "diff"
_GATE_FAILED = 1
_PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_OPTIMIZE_LEVELS: tuple[OptimizeLevel, ...] = get_args(OptimizeLevel)
_PROVIDERS: tuple[TargetProvider, ...] = get_args(TargetProvider)


class _CommaList(click.ParamType[tuple[str, ...]]):
    """`a,b,c`, without empty parts."""

    name = "a,b,c"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        parts = tuple(part.strip() for part in str(value).split(","))
        if not all(parts):
            self.fail("expected names with commas between them, such as a,b,c", param, ctx)
        return parts


class _PrecisionList(_CommaList):
    """Precisions that this release builds."""

    name = ",".join(_PRECISIONS)

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        parts = super().convert(value, param, ctx)
        for part in parts:
            if part not in _PRECISIONS:
                self.fail(
                    f"{part!r} is not built by this release; it builds: {', '.join(_PRECISIONS)}", param, ctx
                )
        return tuple(dict.fromkeys(parts))


@click.command(
    "te-export",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExit codes:\n  0  done\n  1  a check failed: nothing was written, or a variant was left out (accuracy)\n"
    "  2  wrong usage or a bad input file; nothing was written\n  3  a package or library is missing\n"
    "  70 a defect of te-export, please report it\n  130 interrupted",
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder to make.  [default: <checkpoint stem>-onnx beside the checkpoint]")  # fmt: skip
@click.option(
    "--task", "tasks", multiple=True, metavar="NAME", help="Export this task only; repeat for more."
)
@click.option(
    "--task-names",
    type=_CommaList(),
    metavar="a,b,c",
    help="A name for every task of the checkpoint, in its order.",
)
@click.option(
    "--model",
    metavar="PKG.MOD:FACTORY",
    help="The module that CHECKPOINT holds the weights of: a function or class that gives it. This IMPORTS AND RUNS your "
    "code. Needs --example-input.",
)
@click.option(
    "--example-input",
    type=click.Path(path_type=Path),
    metavar="F.npz",
    help="Rows that the module's forward takes: one array, or an array for each of its named inputs.",
)
@click.option(
    "--precision",
    "precisions",
    type=_PrecisionList(),
    metavar="LIST",
    default="fp32",
    show_default=True,
    help="Variants to build: fp32, int8, int4, fp16. fp32 is built in any case.",
)
@click.option(
    "--calibration-data",
    type=click.Path(path_type=Path),
    metavar="F.npz",
    help="Real inputs (and labels.<task>): int8 takes ranges from half of the rows, and pruning the use of the "
    "experts; everything is judged on the other half.",
)
@click.option(
    "--max-accuracy-drop",
    type=click.FloatRange(min=0, max=100),
    metavar="POINTS",
    default=0.5,
    show_default=True,
    help="What a task may lose in a variant; layers stay in float32 until it fits.",
)
@click.option(
    "--prune-experts",
    type=click.FloatRange(min=0, max=100),
    metavar="POINTS",
    help="Also write task graphs without the experts that a task hardly uses, where it loses no more than this; "
    "needs --calibration-data.",
)
@click.option(
    "--opset",
    type=int,
    metavar="N",
    help="ONNX opset of the graphs.  [default: the newest that the installed onnxruntime runs]",
)
@click.option(
    "--standalone", is_flag=True, help="Also write each task as one .onnx file with its weights inside."
)
@click.option(
    "--optimize",
    type=click.Choice(_OPTIMIZE_LEVELS),
    default="exact",
    show_default=True,
    help="Rewrite the graphs into cheaper ones of the same function, or write them as captured.",
)
@click.option(
    "--provider",
    type=click.Choice(_PROVIDERS),
    default="cpu",
    show_default=True,
    help="The execution provider the graphs are shaped for; they run on any.",
)
@click.option(
    "--atol",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Judge parity by |error| <= atol + rtol*|oracle| instead of by torch's own error.",
)
@click.option("--rtol", type=click.FloatRange(min=0), metavar="X", help="See --atol.")
@click.option(
    "--trust-pickle",
    is_flag=True,
    help="Let the checkpoint RUN CODE on this machine to rebuild its objects. Only for files you trust.",
)
@click.option(
    "--measure-latency",
    is_flag=True,
    help="Time the graphs of every variant on this machine, for a minute at most, and write the figures into the "
    "manifest and the reports. Their bytes then differ from one export to the next.",
)
@click.option("--force", is_flag=True, help="Replace a bundle that stands where the new one goes.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Do everything, checks included, then remove it: the target stays as it is.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output and nothing else there."
)
@click.option("-v", "--verbose", is_flag=True, help="Say more; show tracebacks of errors.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.version_option(VERSION, "--version", prog_name="te-export")
def command(
    checkpoint: Path,
    output: Path | None,
    tasks: tuple[str, ...],
    task_names: tuple[str, ...] | None,
    model: str | None,
    example_input: Path | None,
    precisions: tuple[Precision, ...],
    calibration_data: Path | None,
    max_accuracy_drop: float,
    prune_experts: float | None,
    opset: int | None,
    standalone: bool,
    optimize: OptimizeLevel,
    provider: TargetProvider,
    atol: float | None,
    rtol: float | None,
    trust_pickle: bool,
    measure_latency: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> Outcome:
    """Turn a trained multi-task mixture-of-experts CHECKPOINT (.pt, .pth, .safetensors) into a verified
    ONNX bundle; with --model, or from a .pt2 file, any multi-task module.

    The bundle holds a graph for all tasks, one per task, and the trunk and tails apart, all reading one
    weights file. Each graph is proved against torch in float64 before anything is written. te_runtime runs
    the bundle without torch.

    \b
    Examples:
      te-export model.pt
      te-export model.pt -o out --task-names click,buy --force
      te-export model.pt --precision fp32,int8 --calibration-data rows.npz
      te-export weights.pt --model mypkg.models:build --example-input sample.npz --task-names click,buy

    \b
    Also:
      te-export diff A B    what changed between two bundles; te-export diff --help tells more
    """
    options = ExportOptions(
        tasks=tasks or None,
        task_names=task_names,
        precisions=precisions,
        calibration_data=calibration_data,
        max_accuracy_drop=max_accuracy_drop,
        prune_experts=prune_experts,
        model=model,
        example_input=example_input,
        opset=opset,
        standalone=standalone,
        optimize=optimize,
        provider=provider,
        atol=atol,
        rtol=rtol,
        trust_pickle=trust_pickle,
        measure_latency=measure_latency,
        force=force,
        dry_run=dry_run,
    )
    progress: Progress = SilentProgress() if quiet else _StepLines()
    result = _run(checkpoint, output, options, progress)
    left_out = tuple(failed.reason for failed in result.failed_variants)
    exit_code = _GATE_FAILED if left_out else 0
    if as_json:
        from te_export.report.machine import result_object

        return Outcome(json.dumps(result_object(result), allow_nan=False), exit_code, left_out)
    if quiet:
        return Outcome("", exit_code, left_out)
    from te_export.report.terminal import result_lines

    return Outcome("\n".join(result_lines(result, verbose=verbose)), exit_code, left_out)


class _StepLines:
    """One line per step on standard error: `capture   4.9 s  one graph, 105 nodes`.

    On a terminal the running step shows too.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._closed = False

    def started(self, step: str) -> None:
        if self._live:
            self._say(f"  {step:<10} …", nl=False)

    def finished(self, step: str, detail: str, seconds: float) -> None:
        start = "\r\x1b[2K" if self._live else ""
        self._say(f"{start}  {step:<10} {seconds:6.2f} s  {detail}")

    def _say(self, line: str, *, nl: bool = True) -> None:
        """Nobody reading is no reason to end an export: after a closed pipe the steps go unsaid."""
        if self._closed:
            return
        try:
            click.echo(line, nl=nl, err=True)
        except OSError:
            self._closed = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _run(checkpoint: Path, output: Path | None, options: ExportOptions, progress: Progress) -> ExportResult:
    with importing():
        from te_export.pipeline import export
    gc.freeze()  # what was imported stays; looking through it again and again costs 5% of an export
    return export(checkpoint, output, options, progress)


def main() -> None:
    """Entry point: `te-export diff …` compares bundles, anything else exports a checkpoint."""
    arguments = sys.argv[1:]
    if arguments[:1] == [_DIFF]:
        from te_export.cli_diff import command as diff_command

        run_program(diff_command, arguments[1:], prog_name=f"te-export {_DIFF}", interrupted="interrupted")
    run_program(command, arguments, prog_name="te-export", interrupted=_INTERRUPTED_MESSAGE)


if __name__ == "__main__":
    main()

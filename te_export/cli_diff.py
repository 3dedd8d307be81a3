"""`te-export diff A B`: what changed between two bundles. Loads neither torch nor onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import click

from te_export.cli_frame import Outcome, importing

__all__ = ["command"]

_DIFFERENT = 1


class _DiffCommand(click.Command):
    """Says what it compares where an operand is missing."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as error:
            raise click.UsageError(
                f"{error.format_message()} Pass two bundles, folders that te-export wrote: te-export diff A B. "
                "(A checkpoint file of the name diff is exported by: te-export ./diff)",
                ctx,
            ) from error


@click.command(
    "diff",
    cls=_DiffCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExit codes:\n  0  compared, whether they differ or not\n  1  with --exit-code: they differ\n"
    "  2  wrong usage, or a bundle that is damaged or none\n  3  a package is missing\n"
    "  70 a defect of te-export, please report it\n  130 interrupted",
)
@click.argument("a", metavar="A", type=click.Path(path_type=Path))
@click.argument("b", metavar="B", type=click.Path(path_type=Path))
@click.option("--exit-code", is_flag=True, help="Exit with 1 if the bundles differ.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output and nothing else there."
)
@click.option("-v", "--verbose", is_flag=True, help="Show every weight, task and file; tracebacks of errors.")
def command(a: Path, b: Path, exit_code: bool, as_json: bool, verbose: bool) -> Outcome:
    """Show what changed from bundle A to bundle B: model, tasks, weights, graphs, parity, accuracy, routing,
    size, and latency where it was measured.

    Every checksum of both is compared first. Bundles that differ only in their reports, or in measured
    latency, count as equal.

    \b
    Examples:
      te-export diff model-v1-onnx model-v2-onnx
      te-export diff old new --json > changes.json
      te-export diff old new --exit-code > /dev/null || echo changed
    """
    with importing():
        from te_export.compare_bundles import diff
        from te_export.compare_bundles.result_json import diff_object
        from te_export.compare_bundles.text import diff_lines
    found = diff(a, b)
    code = _DIFFERENT if exit_code and found.is_different else 0
    if as_json:
        return Outcome(json.dumps(diff_object(found, exit_code=code), allow_nan=False), code)
    return Outcome("\n".join(diff_lines(found, verbose=verbose)), code)

"""report.md: what was exported and how exact it is, for a person.

No paths, and no times but latency that was asked for: the same bundle gives the same report.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from te_export.options import FailedVariant, TaskPruning
from te_export.report.latency_figures import LATENCY_HEADINGS, latency_meaning, latency_row, timed_graphs
from te_export.report.layer_figures import kept_in, layer_meaning, layer_tables
from te_export.report.left_out import left_out_rows
from te_export.report.pruning_figures import EXPERT_HEADINGS, expert_rows, found_line
from te_export.report.rewrite_costs import COST_HEADINGS, cost_rows, node_list
from te_export.report.variant_figures import accuracy_table, judged_rows, loss_meaning
from te_export.rewrite.log import RewriteLog
from te_runtime.manifest import Manifest, TaskParity, TaskUtilization, TensorSpec, Variant

__all__ = ["REPORT_NAME", "render_report"]

REPORT_NAME = "report.md"
_SHOWN_REWRITES = 24
_OPEN_ROWS = 24


def render_report(
    manifest: Manifest,
    notes: Sequence[str],
    rewrites: RewriteLog,
    pruning: Sequence[TaskPruning] = (),
    *,
    left_out: Sequence[FailedVariant] = (),
) -> str:
    """The whole report as Markdown.

    Args:
        left_out: the variants that were asked for and are not in the bundle.
    """
    parts = [
        f"# {manifest.model.family}: {len(manifest.tasks)} tasks\n",
        _overview(manifest),
        *([_rewrites(manifest.variants[0], rewrites)] if rewrites.costs else []),
        *(_accuracy(variant) for variant in manifest.variants if variant.accuracy),
        *([_left_out(left_out)] if left_out else []),
        _latency(manifest),
        *([_pruning(pruning)] if pruning else []),
        *(_variant(variant) for variant in manifest.variants),
        _routing(manifest.utilization),
    ]
    if notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {_escaped(note)}" for note in notes) + "\n")
    return "\n".join(parts)


def _overview(manifest: Manifest) -> str:
    producer = manifest.producer
    inputs = ", ".join(f"`{spec.name}` {spec.dtype} {_shape(spec)}" for spec in manifest.inputs)
    rows = [(task.name, _shape(task.prediction)) for task in manifest.tasks]
    return (
        f"Input: {inputs}. Parameters used: {manifest.model.parameter_bytes:,} bytes. Opset "
        f"{producer.opset}.\n"
        f"Checkpoint sha256: `{manifest.model.checkpoint_sha256}`.\n"
        f"Made by te-export {producer.te_export}, torch {producer.torch}, onnx {producer.onnx}, "
        f"onnxscript {producer.onnxscript}, onnxruntime {producer.onnxruntime}.\n\n"
        f"{_table(('task', 'prediction'), rows)}"
    )


def _shape(spec: TensorSpec) -> str:
    return f"({', '.join(str(axis) for axis in spec.shape)})"


def _rewrites(variant: Variant, log: RewriteLog) -> str:
    return (
        f"## Exact rewrites, for {variant.target_provider}\n\n"
        f"{len(log.applied)} rewrites that change no function, only what it costs.\n\n"
        + _table(("graph", "", *COST_HEADINGS), (row for costs in log.costs for row in cost_rows(costs)))
        + "\nNodes by operator:\n\n"
        + "".join(
            f"- {costs.graph} {when}: {node_list(cost)}\n"
            for costs in log.costs
            for when, cost in (("captured", costs.before), ("written", costs.after))
        )
        + "\nRewritten:\n\n"
        + "".join(f"- {_escaped(str(entry))}\n" for entry in _shown(log.applied))
        + ("\nLeft as they were:\n\n" if log.declined else "")
        + "".join(f"- {_escaped(str(entry))}\n" for entry in _shown(log.declined))
    )


def _shown(entries: Sequence[object]) -> Sequence[object]:
    """The first of many: with a hundred tasks, what follows repeats them."""
    left = len(entries) - _SHOWN_REWRITES
    return entries if left <= 0 else [*entries[:_SHOWN_REWRITES], f"… and {left} more"]


def _accuracy(variant: Variant) -> str:
    headings, rows = accuracy_table(variant)
    kept = "".join(f"- `{name}`\n" for name in variant.kept_weights)
    return (
        f"## {variant.precision} ({variant.form}): what each task lost\n\n"
        f"Against the float64 oracle, over {judged_rows(variant)}. Loss: {loss_meaning(variant)}. "
        "Arg-max and top expert are the share of rows in which the largest output and the largest routing weight are "
        "the oracle's; routing KL is the mean divergence of the routing weights from the oracle's, in nats.\n\n"
        + _table(headings, rows)
        + (
            f"\nWeights that are held in {kept_in(variant)}, because a task would lose too much:\n\n{kept}"
            if kept
            else ""
        )
        + _layers(variant)
    )


def _layers(variant: Variant) -> str:
    """What each layer costs; nothing for a variant that does not tell."""
    tables = layer_tables(variant)
    if not tables:
        return ""
    return (
        f"\n### {variant.precision}: what each layer costs\n\n{_escaped(layer_meaning(variant))}\n"
        + "".join(
            _foldable(f"{variant.precision}, {table.title}", table.headings, table.rows) for table in tables
        )
    )


def _foldable(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table under its title; one of many rows is folded where Markdown is shown as HTML."""
    text = _table(headings, rows)
    if len(rows) <= _OPEN_ROWS:
        return f"\n{title}:\n\n{text}"
    return f"\n<details><summary>{title} ({len(rows):,} rows)</summary>\n\n{text}\n</details>\n"


def _left_out(left_out: Sequence[FailedVariant]) -> str:
    entries = "".join(f"- {precision}: {_escaped(reason)}\n" for precision, reason in left_out_rows(left_out))
    return f"## Variants that were asked for and are left out\n\n{entries}"


def _latency(manifest: Manifest) -> str:
    if manifest.latency is None:
        return "## Latency\n\nNot measured; `te-export --measure-latency` does.\n"
    return f"## Latency\n\n{_escaped(latency_meaning(manifest.latency))}\n\n" + _table(
        LATENCY_HEADINGS, (latency_row(timed) for timed in timed_graphs(manifest))
    )


def _pruning(pruning: Sequence[TaskPruning]) -> str:
    return (
        "## Task graphs without experts that are hardly used\n\n"
        "Routing weights over the calibration rows. An expert whose largest weight stays under the share it would "
        "have if all were used alike is replaced by its mean output, where the task can spare it on the judged rows.\n\n"
        + "".join(f"- {_escaped(found_line(found))}\n" for found in pruning)
        + "\n"
        + _table(EXPERT_HEADINGS, (row for found in pruning for row in expert_rows(found)))
    )


def _variant(variant: Variant) -> str:
    checked = variant.parity[0].prediction.groups
    groups = ", ".join(f"{group.rows} {group.group}" for group in checked)
    figures = (
        "task",
        "output",
        "RMS",
        "torch's RMS",
        "max relative",
        "torch's max relative",
        "arg-max agreement",
    )
    return (
        f"## {variant.precision}: parity with torch in float64\n\n"
        f"Every graph was run over {sum(group.rows for group in checked)} rows ({groups}) at batch sizes 1, 2, "
        "7 and 64; the worst graph is shown. *Torch's own* is the error of torch float32 on the same rows in the "
        "same batches; *allowed* is what the error had to stay within.\n\n"
        + _table(
            ("task", "output", "rows", "max abs error", "torch's own", "ratio", "allowed"),
            (row for parity in variant.parity for row in _group_rows(parity)),
        )
        + "\nRMS errors are over ordinary rows, relative errors over the larger of the value and its group's RMS, "
        "arg-max agreement with float64 over all rows.\n\n"
        + _table(figures, (row for parity in variant.parity for row in _figure_rows(parity)))
    )


def _group_rows(parity: TaskParity) -> Iterable[tuple[str, ...]]:
    for output, figures in parity.outputs.items():
        for group in figures.groups:
            own = group.torch_max_abs_error
            yield (
                parity.task,
                output,
                group.group,
                f"{group.max_abs_error:.2e}",
                f"{own:.2e}",
                f"{group.max_abs_error / own:.2f}" if own else "-",
                f"{group.bound:.2e}",
            )


def _figure_rows(parity: TaskParity) -> Iterable[tuple[str, ...]]:
    for output, figures in parity.outputs.items():
        yield (
            parity.task,
            output,
            f"{figures.rms_error:.2e}",
            f"{figures.torch_rms_error:.2e}",
            f"{figures.max_rel_error:.2e}",
            f"{figures.torch_max_rel_error:.2e}",
            "-" if figures.argmax_agreement is None else f"{figures.argmax_agreement:.2%}",
        )


def _routing(utilization: Sequence[TaskUtilization]) -> str:
    rows = [
        (task.task, str(expert), f"{mean:.3f}", f"{low:.3f} to {high:.3f}", str(wins))
        for task in utilization
        for expert, (mean, low, high, wins) in enumerate(
            zip(task.mean, task.low, task.high, task.wins, strict=True)
        )
    ]
    silent = [
        f"{task.task}: {', '.join(str(expert) for expert, wins in enumerate(task.wins) if not wins)}"
        for task in utilization
        if not all(task.wins)
    ]
    remark = (
        f"Experts that had the largest weight in no row of the check: {'; '.join(silent)}. Their weights "
        "still moved over the range shown."
        if silent
        else "Every expert had the largest weight in some row of every task."
    )
    return (
        "## Routing, as exercised by the check\n\n"
        "Mean routing weight over ordinary rows, range over all rows, and rows in which the expert had the "
        "largest weight.\n\n"
        f"{_table(('task', 'expert', 'mean', 'range', 'rows won'), rows)}\n{remark}\n"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(_escaped(cell) for cell in line) + " |\n" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")

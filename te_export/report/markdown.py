"""report.md: what was exported and how exact it is, for a person.

No times, no paths: the same bundle gives the same report.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from te_runtime.manifest import Manifest, OutputParity, TaskParity, TaskUtilization, TensorSpec, Variant

__all__ = ["REPORT_NAME", "render_report"]

REPORT_NAME = "report.md"


def render_report(manifest: Manifest, notes: Sequence[str]) -> str:
    """The whole report as Markdown."""
    parts = [
        f"# {manifest.model.family}: {len(manifest.tasks)} tasks\n",
        _overview(manifest),
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


def _variant(variant: Variant) -> str:
    rows = [row for parity in variant.parity for row in _parity_rows(parity)]
    header = (
        "task", "output", "max abs error", "torch's own", "ratio", "max rel error", "RMS error", "torch's "
        "own RMS", "arg-max agreement"
    )  # fmt: skip
    checked = variant.parity[0].prediction.groups
    groups = ", ".join(f"{group.rows} {group.group}" for group in checked)
    return (
        f"## {variant.precision}: parity with the float64 oracle\n\n"
        f"Every graph was run over {sum(group.rows for group in checked)} rows ({groups}) at batch sizes "
        "1, 2, 7 and 64; the worst graph is "
        "shown. *Torch's own* is the error of torch float32 on the same rows. Relative errors are over the "
        "larger of the value and its group's "
        "RMS; RMS errors are over ordinary rows.\n\n"
        f"{_table(header, rows)}"
    )


def _parity_rows(parity: TaskParity) -> Iterable[tuple[str, ...]]:
    yield _parity_row(parity.task, "prediction", parity.prediction)
    if parity.routing_weights is not None:
        yield _parity_row(parity.task, "routing weights", parity.routing_weights)


def _parity_row(task: str, output: str, parity: OutputParity) -> tuple[str, ...]:
    return (
        task,
        output,
        f"{parity.max_abs_error:.2e}",
        f"{parity.torch_max_abs_error:.2e}",
        "-" if parity.ratio is None else f"{parity.ratio:.2f}",
        f"{parity.max_rel_error:.2e}",
        f"{parity.rms_error:.2e}",
        f"{parity.torch_rms_error:.2e}",
        "-" if parity.argmax_agreement is None else f"{parity.argmax_agreement:.2%}",
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

"""What report.html says, from the manifest and the logs of the export; report.html.jinja says how it looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from te_export.options import FailedVariant, TaskPruning
from te_export.report.heat_map import HeatBand, heat_bands
from te_export.report.html_files import FileSizes, file_sizes
from te_export.report.html_parity import VariantParity, tasks_parity, variant_parity
from te_export.report.html_summary import summary_sentences
from te_export.report.html_table import Column, Table, columns, make_table
from te_export.report.latency_figures import (
    LATENCY_HEADINGS,
    LATENCY_NUMBERS,
    latency_meaning,
    latency_row,
    timed_graphs,
)
from te_export.report.layer_figures import LAYER_NUMBERS, kept_in, layer_meaning, layer_tables
from te_export.report.left_out import left_out_rows
from te_export.report.pruning_figures import EXPERT_HEADINGS, expert_rows, found_line
from te_export.report.rewrite_costs import COST_HEADINGS, cost_rows, node_list
from te_export.report.variant_figures import accuracy_table, judged_rows, loss_meaning
from te_export.rewrite.log import RewriteLog
from te_runtime.manifest import Latency, Manifest, TensorSpec, Variant

__all__ = ["Accuracy", "Exported", "Layers", "Page", "Pruning", "Rewrites", "Routing", "Timings", "make_page"]

_OPEN_ROWS = 40
_OPEN_EXPERTS = 16
_OPEN_LAYERS = 16
_OPEN_LATENCIES = 18
_LISTED = 100


@dataclass(frozen=True)
class Exported:
    """What the bundle is made of."""

    inputs: Table
    tasks: Table
    config: Table | None
    unused_parameters: tuple[str, ...]


@dataclass(frozen=True)
class Routing:
    """The heat map and what it leaves out.

    Attributes:
        silent: for each task with any, the experts that won no row.
        without_gate: tasks that have no routing weights.
        differ: whether tasks have gates over different numbers of experts.
    """

    bands: tuple[HeatBand, ...]
    silent: tuple[str, ...]
    without_gate: tuple[str, ...]
    differ: bool


@dataclass(frozen=True)
class Rewrites:
    """What the rewrites gained; no costs where graphs are as captured."""

    count: int
    costs: Table | None
    nodes: tuple[tuple[str, str], ...]
    applied: tuple[str, ...]
    declined: tuple[str, ...]


@dataclass(frozen=True)
class Accuracy:
    """What a variant of lower precision lost."""

    precision: str
    form: str
    judged: str
    loss: str
    table: Table
    kept_weights: tuple[str, ...]
    kept_in: str
    layers: Layers | None


@dataclass(frozen=True)
class Layers:
    """What each layer of a variant costs."""

    meaning: str
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Timings:
    """What was measured of latency."""

    meaning: str
    joint: Table
    tasks: Table | None


@dataclass(frozen=True)
class Pruning:
    """What pruning found, and how exact the pruned graphs are."""

    found: tuple[str, ...]
    experts: Table
    parity: Table | None


@dataclass(frozen=True)
class Page:
    """The whole of report.html."""

    title: str
    summary: tuple[str, ...]
    exported: Exported
    parity: tuple[VariantParity, ...]
    routing: Routing
    rewrites: Rewrites
    sizes: FileSizes
    accuracy: tuple[Accuracy, ...]
    left_out: tuple[tuple[str, str], ...]
    latency: Timings | None
    pruning: Pruning | None
    notes: tuple[str, ...]
    target_provider: str
    provenance: tuple[tuple[str, str], ...]


def make_page(
    manifest: Manifest,
    notes: Sequence[str],
    rewrites: RewriteLog,
    pruning: Sequence[TaskPruning],
    *,
    left_out: Sequence[FailedVariant],
) -> Page:
    """Everything the template needs, as text that is not yet escaped."""
    count = len(manifest.tasks)
    return Page(
        title=f"{manifest.model.family}: {count} {'task' if count == 1 else 'tasks'}",
        summary=tuple(summary_sentences(manifest, left_out)),
        exported=_exported(manifest),
        parity=tuple(variant_parity(variant) for variant in manifest.variants),
        routing=_routing(manifest),
        rewrites=_rewrites(rewrites),
        sizes=file_sizes(manifest),
        accuracy=tuple(_accuracy(variant) for variant in manifest.variants if variant.accuracy),
        left_out=tuple(left_out_rows(left_out)),
        latency=None if manifest.latency is None else _latency(manifest, manifest.latency),
        pruning=_pruning(manifest.variants[0], pruning) if pruning else None,
        notes=tuple(notes),
        target_provider=manifest.variants[0].target_provider,
        provenance=tuple(_provenance(manifest)),
    )


def _exported(manifest: Manifest) -> Exported:
    config = [(key, _config_text(value)) for key, value in manifest.model.config.items()]
    return Exported(
        inputs=make_table(
            "Inputs",
            columns("input", "type", "shape", code=("type", "shape")),
            ((spec.name, spec.dtype, _shape(spec)) for spec in manifest.inputs),
        ),
        tasks=make_table(
            "Tasks and what each answers",
            columns(
                "task",
                "type",
                "prediction",
                "routing weights",
                code=("type", "prediction", "routing weights"),
            ),
            (
                (
                    task.name,
                    task.prediction.dtype,
                    _shape(task.prediction),
                    "no gate" if task.routing_weights is None else _shape(task.routing_weights),
                )
                for task in manifest.tasks
            ),
            open_rows=_OPEN_ROWS,
        ),
        config=make_table("Configuration of the model", columns("setting", "value", code=("value",)), config)
        if config
        else None,
        unused_parameters=_listed(manifest.model.unused_parameters),
    )


def _shape(spec: TensorSpec) -> str:
    return f"({', '.join(str(axis) for axis in spec.shape)})"


def _config_text(value: bool | int | float | str | tuple[int, ...]) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _listed(entries: Sequence[object]) -> tuple[str, ...]:
    """The first of many: with a hundred tasks, what follows repeats them."""
    left = len(entries) - _LISTED
    return (*map(str, entries[:_LISTED]), *([f"… and {left:,} more"] if left > 0 else ()))


def _routing(manifest: Manifest) -> Routing:
    with_gate = {entry.task for entry in manifest.utilization}
    return Routing(
        bands=heat_bands(manifest.utilization),
        silent=tuple(
            f"{entry.task}: {', '.join(str(expert) for expert, wins in enumerate(entry.wins) if not wins)}"
            for entry in manifest.utilization
            if not all(entry.wins)
        ),
        without_gate=tuple(name for name in manifest.task_names if name not in with_gate),
        differ=len({len(entry.mean) for entry in manifest.utilization}) > 1,
    )


def _rewrites(log: RewriteLog) -> Rewrites:
    headings = (Column("graph"), Column("state"), *(Column(heading, "number") for heading in COST_HEADINGS))
    rows = (row for costs in log.costs for row in cost_rows(costs))
    return Rewrites(
        count=len(log.applied),
        costs=make_table("Cost of one row, before and after", headings, rows, open_rows=_OPEN_ROWS)
        if log.costs
        else None,
        nodes=_node_lines(log),
        applied=_listed(log.applied),
        declined=_listed(log.declined),
    )


def _node_lines(log: RewriteLog) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"{costs.graph}, {when}", node_list(cost))
        for costs in log.costs
        for when, cost in (("captured", costs.before), ("written", costs.after))
    )


def _accuracy(variant: Variant) -> Accuracy:
    headings, rows = accuracy_table(variant)
    return Accuracy(
        precision=variant.precision,
        form=variant.form,
        judged=judged_rows(variant),
        loss=loss_meaning(variant),
        table=make_table(
            f"{variant.precision}: accuracy kept and lost, task by task",
            (Column(headings[0]), *(Column(heading, "number") for heading in headings[1:])),
            rows,
        ),
        kept_weights=variant.kept_weights,
        kept_in=kept_in(variant),
        layers=_layers(variant) if variant.layers else None,
    )


def _layers(variant: Variant) -> Layers:
    return Layers(
        meaning=layer_meaning(variant),
        tables=tuple(
            make_table(
                f"{variant.precision}: {table.title}",
                columns(*table.headings, numbers=LAYER_NUMBERS, code=("weights",)),
                table.rows,
                open_rows=_OPEN_LAYERS,
            )
            for table in layer_tables(variant)
        ),
    )


def _latency(manifest: Manifest, latency: Latency) -> Timings:
    timed = list(timed_graphs(manifest))
    headings = columns(*LATENCY_HEADINGS, numbers=LATENCY_NUMBERS)
    joint = [latency_row(entry) for entry in timed if entry.task is None]
    tasks = [latency_row(entry) for entry in timed if entry.task is not None]
    return Timings(
        meaning=latency_meaning(latency),
        joint=make_table("Joint graph: all tasks at once", headings, joint),
        tasks=make_table("Task graphs", headings, tasks, open_rows=_OPEN_LATENCIES) if tasks else None,
    )


def _pruning(variant: Variant, pruning: Sequence[TaskPruning]) -> Pruning:
    parity = [graphs.pruned.parity for graphs in variant.tasks if graphs.pruned is not None]
    numbers = [heading for heading in EXPERT_HEADINGS if "weight" in heading]
    return Pruning(
        found=tuple(found_line(found) for found in pruning),
        experts=make_table(
            "Routing weights over the calibration rows",
            columns(*(heading or "state" for heading in EXPERT_HEADINGS), numbers=numbers),
            (row for found in pruning for row in expert_rows(found)),
            open_rows=_OPEN_EXPERTS,
        ),
        parity=tasks_parity("Pruned graphs: distance from torch in float64", parity) if parity else None,
    )


def _provenance(manifest: Manifest) -> Iterator[tuple[str, str]]:
    producer = manifest.producer
    yield "checkpoint sha256", manifest.model.checkpoint_sha256
    yield "parameters used", f"{manifest.model.parameter_bytes:,} bytes"
    yield "te-export", producer.te_export
    yield "torch", producer.torch
    yield "onnx", producer.onnx
    yield "onnxscript", producer.onnxscript
    yield "onnxruntime", producer.onnxruntime
    yield "ONNX opset", str(producer.opset)
    yield "bundle format", f"{manifest.format} version {manifest.version}"

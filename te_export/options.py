"""What a caller may ask of an export, and what comes back. Loads neither torch nor onnx."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from te_export.errors import UsageError
from te_export.rewrite.log import RewriteLog
from te_runtime.manifest import FormName, Manifest, OptimizeLevel, Precision, TargetProvider

if TYPE_CHECKING:
    from te_export.precision.latency import LatencyRatio
    from te_export.pruning.expert_use import ExpertUse

__all__ = [
    "ExportOptions",
    "ExportResult",
    "FailedVariant",
    "OptimizeLevel",
    "Precision",
    "TargetProvider",
    "TaskPruning",
    "VariantSummary",
]


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        tasks: names of the tasks to export, in this order; None exports all, in the checkpoint's order.
        task_names: a name for every task of the checkpoint; None takes the names in the file, else task_0,
            task_1, …
        precisions: the variants to build; fp32 is built whether named or not, and the others are judged
            against it.
        calibration_data: an .npz file of real inputs, and labels if there are any, to take int8 ranges from
            and to judge variants on.
        max_accuracy_drop: percentage points that a task may lose in a variant, where there is data to tell.
        prune_experts: percentage points that a task may lose in a graph of its own without the experts it hardly
            uses, told from the data; None makes no such graphs.
        model: `package.module:factory` whose module the checkpoint holds the weights of. It is imported, so its code
            runs.
        example_input: an .npz file of what that module's forward takes.
        opset: ONNX opset of every graph; None takes the newest that the installed onnxruntime runs.
        standalone: also write each task graph as one file with its weights inside.
        optimize: "exact" rewrites the graphs into cheaper ones of the same function; "none" writes them as
            they were captured.
        provider: the execution provider the graphs are shaped for. They run on any.
        atol, rtol: if either is given, a graph passes where every |error| <= atol + rtol·|oracle|, instead
            of the default bound of 4 times torch's own error. A missing one counts as 0.
        trust_pickle: let the checkpoint run the code it names. Only for files whose author you trust with
            this machine.
        measure_latency: time the joint graph and the task graphs of every variant on this machine, and write the
            figures into the manifest and the reports, whose bytes then differ from one export to the next.
        force: replace a bundle that stands where the new one goes.
        dry_run: do everything, checks included, and publish nothing.

    Raises:
        UsageError: a value is of another type, or a precision is asked for that this release does not build.
    """

    tasks: tuple[str, ...] | None = None
    task_names: tuple[str, ...] | None = None
    precisions: tuple[Precision, ...] = ("fp32",)
    calibration_data: Path | None = None
    max_accuracy_drop: float = 0.5
    prune_experts: float | None = None
    model: str | None = None
    example_input: Path | None = None
    opset: int | None = None
    standalone: bool = False
    optimize: OptimizeLevel = "exact"
    provider: TargetProvider = "cpu"
    atol: float | None = None
    rtol: float | None = None
    trust_pickle: bool = False
    measure_latency: bool = False
    force: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name, value in (("tasks", self.tasks), ("task_names", self.task_names)):
            if isinstance(value, str):
                raise UsageError(f"{name}: got the text {value!r:.80}, expected names: pass ({value!r:.80},)")
        if self.opset is not None and type(self.opset) is not int:
            raise UsageError(f"opset: got {self.opset!r:.40}, expected a whole number")
        for option, asked, known in (
            ("optimize", self.optimize, get_args(OptimizeLevel)),
            ("provider", self.provider, get_args(TargetProvider)),
        ):
            if asked not in known:
                raise UsageError(f"{option}: got {asked!r:.40}, expected one of {', '.join(known)}")
        known_precisions = get_args(Precision)
        if not all(name in known_precisions for name in self.precisions):
            raise UsageError(
                f"precisions {self.precisions!r:.80}: expected a tuple of {', '.join(known_precisions)}"
            )
        _check_points("max_accuracy_drop", self.max_accuracy_drop)
        if self.prune_experts is not None:
            _check_points("prune_experts", self.prune_experts)
            if self.calibration_data is None:
                raise UsageError(
                    "pruning needs data that tells which experts a task uses, and what it loses without them. "
                    "Add --calibration-data F.npz, or leave --prune-experts out."
                )
        elif self.calibration_data is not None and not self.lower_precisions:
            raise UsageError(
                "calibration data is for variants of lower precision and for pruning, and neither is asked for. "
                "Add --precision fp32,int8 or --prune-experts 0.5, or leave --calibration-data out."
            )

    @property
    def lower_precisions(self) -> tuple[Precision, ...]:
        """The variants beside fp32, each once, in the order asked for."""
        return tuple(dict.fromkeys(name for name in self.precisions if name != "fp32"))


def _check_points(option: str, points: object) -> None:
    if not (isinstance(points, int | float) and math.isfinite(points) and 0 <= points <= 100):
        raise UsageError(f"{option}: got {points!r:.40}, expected percentage points from 0 to 100")


@dataclass(frozen=True)
class VariantSummary:
    """What building a variant of lower precision found, beside what the manifest keeps.

    Attributes:
        size_bytes: of its folder in the bundle.
        converted: weights that were converted.
        latencies: of all tasks over fp32, on this machine's CPU in one thread, for each form that was tried.
    """

    precision: Precision
    form: FormName
    size_bytes: int
    converted: tuple[str, ...]
    latencies: Mapping[FormName, tuple[LatencyRatio, ...]]


@dataclass(frozen=True)
class FailedVariant:
    """A variant that was asked for and is not in the bundle, and why."""

    precision: Precision
    reason: str


@dataclass(frozen=True)
class TaskPruning:
    """What pruning found for one task.

    Attributes:
        use: the routing weights of every expert over the calibration rows.
        removed: the experts that its pruned graph is without; empty where there is none.
        loss_points: what the task loses in it; None where there is none.
        budget_points: the most it may lose.
        reason: why nothing went; empty where something did.
        added_bytes: of the weights that the pruned graph does not share with the others.
        latencies: of the pruned graph over the task graph, on this machine's CPU in one thread.
    """

    task: str
    use: ExpertUse
    budget_points: float
    removed: tuple[int, ...] = ()
    loss_points: float | None = None
    reason: str = ""
    added_bytes: int = 0
    latencies: tuple[LatencyRatio, ...] = ()


@dataclass(frozen=True)
class ExportResult:
    """What an export made.

    Attributes:
        bundle: the folder the bundle is in; with dry_run, where it would have been.
        published: whether the bundle is there now (False with dry_run).
        manifest: what the bundle's manifest.json says.
        task_size_bytes: for each task, what its task graph takes alone: the graph file and the weights it
            reads.
        notes: what a person should know: unused parameters, prefixes removed, tensors widened.
        size_bytes: of the whole bundle.
        step_seconds: wall time of each step, in order.
        rewrites: what was rewritten, what was left and why, and what the graphs cost before and after.
        variants: the variants of lower precision that were built.
        failed_variants: those that could not be built within what a task may lose; the bundle is published
            without them.
        pruning: what pruning found for each task; empty where it was not asked for.
    """

    bundle: Path
    published: bool
    manifest: Manifest
    task_size_bytes: dict[str, int]
    notes: tuple[str, ...]
    size_bytes: int
    step_seconds: tuple[tuple[str, float], ...]
    rewrites: RewriteLog
    variants: tuple[VariantSummary, ...] = ()
    failed_variants: tuple[FailedVariant, ...] = ()
    pruning: tuple[TaskPruning, ...] = ()

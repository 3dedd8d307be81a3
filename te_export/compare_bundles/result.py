"""What a comparison of two bundles found. `before` is bundle A, `after` bundle B; None stands for what one of them lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from te_runtime.manifest import FormName, OptimizeLevel, Precision, TargetProvider

__all__ = [
    "AccuracyChange",
    "BundleDiff",
    "BundleSide",
    "Fact",
    "FactValue",
    "FileChange",
    "GraphChange",
    "GraphKind",
    "LatencyChange",
    "LatencyDiff",
    "LatencySide",
    "ParityChange",
    "PrunedChange",
    "RoutingChange",
    "TaskChange",
    "TaskPair",
    "TasksDiff",
    "ValueChange",
    "VariantChange",
    "VariantSide",
    "WeightChange",
    "WeightStatus",
    "WeightsDiff",
]

FactValue: TypeAlias = bool | int | float | str | tuple[int | str, ...] | None
WeightStatus = Literal["same", "changed", "reshaped", "removed", "added"]
GraphKind = Literal["joint", "trunk", "joint-tails", "task", "tail", "pruned"]


@dataclass(frozen=True)
class BundleSide:
    """One of the two bundles.

    Attributes:
        path: as it was named.
        size_bytes: of every file that its manifest lists.
    """

    path: str
    manifest_sha256: str
    family: str
    tasks: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True)
class Fact:
    """One named value that differs."""

    name: str
    before: FactValue
    after: FactValue


@dataclass(frozen=True)
class TaskPair:
    """A task in both bundles, or in one alone; with two names where its weights are the same bytes under both."""

    before: str | None
    after: str | None

    @property
    def is_renamed(self) -> bool:
        return self.before is not None and self.after is not None and self.before != self.after

    @property
    def in_both(self) -> bool:
        return self.before is not None and self.after is not None


@dataclass(frozen=True)
class TaskChange:
    """What changed of the interface of a task in both bundles: shapes, dtypes, number of experts."""

    task: TaskPair
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class TasksDiff:
    """Attributes:
    pairs: every task, A's in A's order, then those of B alone.
    is_reordered: whether the tasks in both stand in another order.
    changes: of the tasks in both, those with another interface.
    """

    pairs: tuple[TaskPair, ...]
    is_reordered: bool
    changes: tuple[TaskChange, ...]

    @property
    def added(self) -> tuple[str, ...]:
        return tuple(pair.after for pair in self.pairs if pair.before is None and pair.after is not None)

    @property
    def removed(self) -> tuple[str, ...]:
        return tuple(pair.before for pair in self.pairs if pair.after is None and pair.before is not None)

    @property
    def renamed(self) -> tuple[TaskPair, ...]:
        return tuple(pair for pair in self.pairs if pair.is_renamed)

    @property
    def in_both(self) -> tuple[TaskPair, ...]:
        return tuple(pair for pair in self.pairs if pair.in_both)

    @property
    def is_different(self) -> bool:
        return self.is_reordered or bool(self.changes) or any(p.before != p.after for p in self.pairs)


@dataclass(frozen=True)
class ValueChange:
    """How far the numbers of one weight moved, over all of its elements.

    The last four are None where a number is not finite, or the data type is not one that is measured.

    Attributes:
        elements: of the weight.
        changed: elements whose bits differ.
        rms_difference: root of the mean squared difference.
        rms_before, rms_after: roots of the mean squares.
    """

    elements: int
    changed: int
    max_abs_difference: float | None
    rms_difference: float | None
    rms_before: float | None
    rms_after: float | None

    @property
    def relative_rms(self) -> float | None:
        """RMS of the difference over that of A's numbers; None where these are all 0."""
        if self.rms_difference is None or not self.rms_before:
            return None
        return self.rms_difference / self.rms_before


@dataclass(frozen=True)
class WeightChange:
    """One weight of either bundle.

    Attributes:
        part_before, part_after: of the model, such as `gate of click`.
        shape_before, shape_after: as the layer has it; axes of one do not count.
        values: where it is in both with one shape and other bytes.
    """

    status: WeightStatus
    name_before: str | None
    name_after: str | None
    part_before: str | None
    part_after: str | None
    shape_before: tuple[int, ...] | None
    shape_after: tuple[int, ...] | None
    values: ValueChange | None = None

    @property
    def part(self) -> str:
        """For a person: the part of the model that it is of, in both bundles."""
        parts = dict.fromkeys(part for part in (self.part_before, self.part_after) if part is not None)
        return " → ".join(parts)

    @property
    def name(self) -> str:
        names = dict.fromkeys(name for name in (self.name_before, self.name_after) if name is not None)
        return " → ".join(names)


@dataclass(frozen=True)
class WeightsDiff:
    """Weights of the fp32 variants.

    Attributes:
        weights: every one of either bundle, in A's order, then those of B alone.
        is_compared: False where a bundle has no fp32 variant; `weights` is then empty.
    """

    weights: tuple[WeightChange, ...]
    is_compared: bool = True

    @property
    def is_different(self) -> bool:
        return any(weight.status != "same" for weight in self.weights)


@dataclass(frozen=True)
class GraphChange:
    """A graph of both bundles whose nodes, names, shapes or constants differ; its weights do not count here.

    Attributes:
        task: whose it is; None for joint, trunk and joint tails.
        operators_before, operators_after: nodes of each kind; they may be the same.
    """

    kind: GraphKind
    task: TaskPair | None
    path_before: str
    path_after: str
    operators_before: Mapping[str, int]
    operators_after: Mapping[str, int]


@dataclass(frozen=True)
class ParityChange:
    """The largest error over what was allowed, of any output and group of rows of one task.

    None where the task, or its pruned graph, is in one bundle alone; infinite errors do not pass an export.
    """

    task: TaskPair
    before: float | None
    after: float | None


@dataclass(frozen=True)
class AccuracyChange:
    """What one task lost in a variant of lower precision, or in its pruned graph, in percentage points.

    Attributes:
        facts: what else was judged otherwise: metric, source of the rows, their number, the budget. Where this is
            not empty, the two losses are no measure of each other.
    """

    task: TaskPair
    before: float | None
    after: float | None
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True)
class PrunedChange:
    """The experts that a task's pruned graph does without; None where it has no such graph."""

    task: TaskPair
    experts_before: tuple[int, ...] | None
    experts_after: tuple[int, ...] | None
    loss: AccuracyChange
    parity: ParityChange


@dataclass(frozen=True)
class VariantSide:
    """What a variant is, in one bundle."""

    form: FormName
    optimized: OptimizeLevel
    target_provider: TargetProvider
    size_bytes: int


@dataclass(frozen=True)
class VariantChange:
    """One precision of either bundle. Everything below the sides is empty where one bundle lacks it.

    Attributes:
        facts: form, optimization, provider, whether there is a trunk, whether there are standalone graphs.
        kept_added, kept_removed: weights that stay in higher precision.
        graphs: those with another structure.
        compared_graphs: how many are in both.
        parity, accuracy, pruned: of the tasks whose figures differ.
    """

    precision: Precision
    before: VariantSide | None
    after: VariantSide | None
    facts: tuple[Fact, ...] = ()
    kept_added: tuple[str, ...] = ()
    kept_removed: tuple[str, ...] = ()
    graphs: tuple[GraphChange, ...] = ()
    compared_graphs: int = 0
    parity: tuple[ParityChange, ...] = ()
    accuracy: tuple[AccuracyChange, ...] = ()
    pruned: tuple[PrunedChange, ...] = ()

    @property
    def is_different(self) -> bool:
        told = (
            self.facts,
            self.kept_added,
            self.kept_removed,
            self.graphs,
            self.parity,
            self.accuracy,
            self.pruned,
        )
        return self.before is None or self.after is None or any(told)


@dataclass(frozen=True)
class RoutingChange:
    """How far the mean routing weights of a task moved.

    Attributes:
        distance: total variation, half the sum of absolute differences: 0 for the same use of the experts, 1 for no
            expert in common; None where one bundle has no baseline for it or another number of experts.
    """

    task: TaskPair
    distance: float | None


@dataclass(frozen=True)
class FileChange:
    """One file that a manifest lists. Sizes are None where a bundle does not have it."""

    path: str
    before_bytes: int | None
    after_bytes: int | None
    is_same: bool

    @property
    def is_report(self) -> bool:
        """Whether it tells of the bundle, for people, and is nothing that runs or checks."""
        return self.path in ("report.md", "report.html")


@dataclass(frozen=True)
class LatencySide:
    """On what a bundle's latency was measured when it was exported."""

    machine: str
    onnxruntime: str
    provider: str
    threads: int


@dataclass(frozen=True)
class LatencyChange:
    """One graph at one batch size, measured by both exports: percentiles over rounds, in microseconds.

    Attributes:
        task: whose graph it is; None for the joint graph.
    """

    task: TaskPair | None
    precision: Precision
    batch: int
    p50_us_before: float
    p50_us_after: float
    p10_us_before: float
    p10_us_after: float
    p90_us_before: float
    p90_us_after: float

    @property
    def spreads_overlap(self) -> bool:
        """Whether the ranges from p10 to p90 touch, so that the difference may be noise of either run."""
        return self.p10_us_before <= self.p90_us_after and self.p10_us_after <= self.p90_us_before


@dataclass(frozen=True)
class LatencyDiff:
    """Attributes:
    before, after: None where that bundle's export did not measure.
    graphs: those measured in both.
    is_same: whether the manifests say the same.
    """

    before: LatencySide | None
    after: LatencySide | None
    graphs: tuple[LatencyChange, ...]
    is_same: bool

    @property
    def is_comparable(self) -> bool:
        """Whether machine, onnxruntime, provider and threads were the same, so that a ratio says something."""
        return self.before is not None and self.before == self.after

    def ratio(self, graph: LatencyChange) -> float | None:
        """B's median over A's; None where the two were not measured on the same machine in the same way."""
        return graph.p50_us_after / graph.p50_us_before if self.is_comparable else None


@dataclass(frozen=True)
class BundleDiff:
    """What differs between bundle A and bundle B.

    Attributes:
        model: facts about the checkpoint, the family, its config, and the versions that wrote the bundle.
        inputs: facts about the model's inputs.
        variants: every precision of either, A's first.
        routing: of the tasks in both whose use of the experts moved.
        golden_is_same: whether the golden rows are the same file.
        files: every file of either, by path.
    """

    a: BundleSide
    b: BundleSide
    model: tuple[Fact, ...]
    inputs: tuple[Fact, ...]
    tasks: TasksDiff
    weights: WeightsDiff
    variants: tuple[VariantChange, ...]
    routing: tuple[RoutingChange, ...]
    golden_is_same: bool
    files: tuple[FileChange, ...]
    latency: LatencyDiff

    @property
    def is_different(self) -> bool:
        """Whether anything differs but reports for people and measured latency, which no two runs share."""
        return (
            bool(self.model or self.inputs or self.routing)
            or self.tasks.is_different
            or self.weights.is_different
            or any(variant.is_different for variant in self.variants)
            or any(not file.is_same and not file.is_report for file in self.files)
        )

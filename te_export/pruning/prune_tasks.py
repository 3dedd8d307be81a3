"""A graph for each task without the experts that it hardly uses, within what the task may lose.

    routing weights and mean outputs on the calibration rows → candidates → those the task can spare, by the judged
    rows → the graph without them → exact rewrites → judged again as it is → timed

The graph stacks the experts' first layers only in runs of neighbours, which are ranges of the joint graph's stack.
On R with experts 2 and 5 of 8 gone (one thread, onnxruntime 1.31), latency over the task graph at 1 / 8 / 64 rows,
and bytes that weights.bin grows by, beside one stack of all kept experts, which must be stored again:

    runs of neighbours     0.83 / 0.83 / 0.86       0.40 MB, 0.39 of them the gate's cut weight
    one stack              0.79 / 0.82 / 0.85       3.56 MB, of 14.0 without any pruned graph

Four points at one row are not worth a quarter of the weights again for each task.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from te_export.bundle.accuracy_entry import accuracy_entry
from te_export.bundle.weights_file import plan_weights
from te_export.capture.joint_graph import JointGraph
from te_export.models.input_rows import InputRows
from te_export.options import ExportOptions, TaskPruning
from te_export.partition import GraphSet, cut_task, order_initializers
from te_export.precision.accuracy import TaskAccuracy as Figures
from te_export.precision.accuracy import doubt_labels
from te_export.precision.evaluation import Evaluation
from te_export.precision.latency import LatencyRatio, latency_feeds, measure_ratios
from te_export.precision.trial import open_trial
from te_export.pruning.choose_experts import answer_with_means, choose_experts
from te_export.pruning.expert_use import ExpertUse, mean_outputs, measure_use
from te_export.pruning.mixture import find_mixture
from te_export.pruning.prune_experts import Means, prune_experts
from te_export.pruning.shared_weights import SharedWeights, share_weights, shared_weights
from te_export.rewrite.rewrite import rewrite_alone
from te_runtime.manifest import TaskAccuracy
from te_runtime.session_types import Session

__all__ = ["PrunedTask", "prune_tasks"]

_SECONDS = 0.5
"""How long one batch size of one task is timed: there may be a hundred tasks."""


@dataclass(frozen=True)
class PrunedTask:
    """A task graph without some experts, not yet written.

    Attributes:
        graph: one task's, with the sources of its initializers.
        means: the experts that are gone, ascending, with their mean outputs (D,).
        note: what a person must know, or nothing.
    """

    graph: JointGraph
    means: Means
    accuracy: TaskAccuracy
    note: str


@dataclass(frozen=True)
class _Work:
    """What is the same for every task.

    Attributes:
        evaluation: its budget is that of pruning.
        trunk: opened.
        means: (K, D) float64.
    """

    captured: JointGraph
    graphs: GraphSet
    evaluation: Evaluation
    options: ExportOptions
    trunk: Session
    means: NDArray[np.float64]
    shared: SharedWeights

    def means_of(self, experts: Sequence[int]) -> Means:
        return {expert: self.means[expert] for expert in sorted(experts)}


def prune_tasks(
    captured: JointGraph,
    graphs: GraphSet,
    evaluation: Evaluation,
    *,
    options: ExportOptions,
    scratch: Path,
) -> tuple[tuple[TaskPruning, ...], dict[str, PrunedTask]]:
    """Prune every task on its own.

    Args:
        captured: the joint graph before any rewrite.
        graphs: as they will be written; they stay as they are.
        evaluation: with calibration rows.
        options: with a budget for pruning.
        scratch: a folder for graphs that are tried; the caller removes it.

    Returns:
        What was found for every task, and by name the graphs of those without some expert.

    Raises:
        BundleError: onnxruntime cannot run a graph.
    """
    assert evaluation.calibration is not None  # ExportOptions asks for data
    assert options.prune_experts is not None  # or nobody would call
    assert graphs.trunk is not None  # the models whose experts can go have one
    uses = measure_use(open_trial(graphs.joint, scratch), evaluation.calibration, captured.tasks)
    trunk = open_trial(graphs.trunk, scratch)
    work = _Work(
        captured=captured,
        graphs=graphs,
        evaluation=replace(evaluation, budget_points=options.prune_experts),
        options=options,
        trunk=trunk,
        means=mean_outputs(trunk, evaluation.calibration),
        shared=shared_weights([model.graph for model in graphs.models]),
    )
    found: dict[str, PrunedTask] = {}
    told: list[TaskPruning] = []
    for task, use in uses.items():
        with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
            pruned = _prune(work, task, use, Path(folder))
            if isinstance(pruned, str):
                told.append(TaskPruning(task, use, work.evaluation.budget_points, reason=pruned))
            else:
                found[task] = pruned
                told.append(_tell(work, task, use, pruned, Path(folder)))
    return tuple(told), found


def _prune(work: _Work, task: str, use: ExpertUse, scratch: Path) -> PrunedTask | str:
    """The graph of a task without the experts it can spare, or why there is none."""
    candidates = use.candidates()
    if not candidates:
        return f"every expert is used: the least has weight up to {min(use.largest):.2f}"
    mixture = find_mixture(cut_task(work.captured, task).graph)
    if isinstance(mixture, str):
        return f"its graph is left alone: {mixture}"
    tail = open_trial(work.graphs.tails[task], scratch)
    removed = choose_experts(
        candidates,
        count=mixture.count,
        loss=lambda experts: _loss_without(work, task, tail, experts),
        budget=work.evaluation.budget_points,
    )
    while removed:  # rounding may tell the graph itself from the trial
        graph = _build(work, task, removed)
        if isinstance(graph, str):
            return f"its graph is left alone: {graph}"
        figures = _measure(work, task, graph.model, scratch)
        if work.evaluation.loss_points(figures) <= work.evaluation.budget_points:
            accuracy = accuracy_entry(task, figures, work.evaluation)
            note = doubt_labels(task, figures, "pruning")
            return PrunedTask(graph, work.means_of(removed), accuracy, note)
        removed = removed[:-1]
    shown = ", ".join(map(str, sorted(candidates)))
    return (
        f"experts {shown} have little weight, but without any one of them the task loses more than the "
        f"{work.evaluation.budget_points:g} points allowed"
    )


def _loss_without(work: _Work, task: str, tail: Session, experts: Sequence[int]) -> float:
    answer = answer_with_means(work.trunk, tail, work.means_of(experts))
    return work.evaluation.loss_points(work.evaluation.measure_task(task, answer))


def _build(work: _Work, task: str, experts: Sequence[int]) -> JointGraph | str:
    cut = prune_experts(cut_task(work.captured, task), work.means_of(experts), task=task)
    if isinstance(cut, str):
        return cut
    graph = rewrite_alone(
        replace(
            work.captured,
            model=cut.model,
            tasks=(task,),
            sources={**work.captured.sources, **cut.sources},
        ),
        provider=work.options.provider,
        level=work.options.optimize,
        laid_out=work.shared.laid_out,
    )
    made = share_weights(graph.model, work.shared, suffix=f".pruned-{task}")
    graph.model.graph.name = f"pruned-{task}"
    order_initializers(graph.model.graph)
    sources = dict(graph.sources)
    for new, old in made.items():
        sources[new] = sources.get(old, (old,))
    return replace(graph, sources=sources)


def _measure(work: _Work, task: str, model: ir.Model, scratch: Path) -> Figures:
    session = open_trial(model, scratch)
    names = [spec.name for spec in session.spec.inputs]
    return work.evaluation.measure_task(task, lambda x: session.run(x.feeds(names)))


def _tell(work: _Work, task: str, use: ExpertUse, pruned: PrunedTask, scratch: Path) -> TaskPruning:
    model, own = pruned.graph.model, work.graphs.tasks[task]
    return TaskPruning(
        task=task,
        use=use,
        budget_points=work.evaluation.budget_points,
        removed=tuple(pruned.means),
        loss_points=pruned.accuracy.loss_points,
        added_bytes=_added_bytes(work.graphs, model),
        latencies=_latencies({"task": own, "pruned": model}, work.evaluation.x, scratch),
    )


def _added_bytes(graphs: GraphSet, model: ir.Model) -> int:
    others = [other.graph for other in graphs.models]
    return plan_weights([*others, model.graph]).size_bytes - plan_weights(others).size_bytes


def _latencies(models: Mapping[str, ir.Model], x: InputRows, scratch: Path) -> tuple[LatencyRatio, ...]:
    sessions = {name: open_trial(model, scratch) for name, model in models.items()}
    names = [spec.name for spec in sessions["task"].spec.inputs]
    ratios = measure_ratios(sessions, latency_feeds(names, x), seconds=_SECONDS)
    return tuple(ratio for ratio in ratios if ratio.name == "pruned")

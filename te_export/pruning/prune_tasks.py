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

import onnx_ir as ir

from te_export.bundle.accuracy_entry import accuracy_entry
from te_export.bundle.weights_file import plan_weights
from te_export.capture.joint_graph import JointGraph, routing_weights_name
from te_export.models.input_rows import InputRows
from te_export.options import ExportOptions, TaskPruning
from te_export.partition import GraphSet, cut_task, order_initializers
from te_export.precision.accuracy import TaskAccuracy as Figures
from te_export.precision.accuracy import doubt_labels
from te_export.precision.evaluation import Evaluation
from te_export.precision.latency import LatencyRatio, latency_feeds, measure_ratios
from te_export.precision.trial import open_trial
from te_export.pruning.choose_experts import choose_experts
from te_export.pruning.expert_use import ExpertUse, measure_use
from te_export.pruning.freed_parameters import freed_by
from te_export.pruning.means_trial import Means, MeansTrial, find_trial
from te_export.pruning.prune_experts import prune_experts
from te_export.pruning.shared_weights import SharedWeights, share_weights, shared_weights
from te_export.rewrite.rewrite import rewrite_alone
from te_export.verify.batches import plan_batches
from te_export.verify.graph_runs import GraphRun
from te_runtime.manifest import TaskAccuracy

__all__ = ["PrunedTask", "prune_tasks"]

_SECONDS = 0.5
"""How long one batch size of one task is timed: there may be a hundred tasks."""


@dataclass(frozen=True)
class PrunedTask:
    """A task graph without some experts, not yet written.

    Attributes:
        graph: one task's, with the sources of its initializers.
        removed: the experts that are gone, ascending.
        place: which of the mixtures of the task graph as captured they were in.
        expected: what the task graph as captured gives for the probe rows while those experts answer their means.
        note: what a person must know, or nothing.
    """

    graph: JointGraph
    removed: tuple[int, ...]
    place: int
    expected: GraphRun
    accuracy: TaskAccuracy
    note: str


@dataclass(frozen=True)
class _Work:
    """What is the same for every task.

    Attributes:
        evaluation: its budget is that of pruning.
        calibration: the rows that tell means.
        probe_rows: the rows that every graph is proved on.
    """

    captured: JointGraph
    graphs: GraphSet
    evaluation: Evaluation
    calibration: InputRows
    probe_rows: InputRows
    options: ExportOptions
    shared: SharedWeights


def prune_tasks(
    captured: JointGraph,
    graphs: GraphSet,
    evaluation: Evaluation,
    *,
    probe_rows: InputRows,
    options: ExportOptions,
    scratch: Path,
) -> tuple[tuple[TaskPruning, ...], dict[str, PrunedTask]]:
    """Prune every task on its own.

    Args:
        captured: the joint graph before any rewrite.
        graphs: as they will be written; they stay as they are.
        evaluation: with calibration rows.
        probe_rows: what every graph is proved on.
        options: with a budget for pruning.
        scratch: a folder for graphs that are tried; the caller removes it.

    Returns:
        What was found for every task, and by name the graphs of those without some expert.

    Raises:
        BundleError: onnxruntime cannot run a graph.
    """
    assert evaluation.calibration is not None  # ExportOptions asks for data
    assert options.prune_experts is not None  # or nobody would call
    given = {str(value.name) for value in captured.model.graph.outputs}
    gated = tuple(task for task in captured.tasks if routing_weights_name(task) in given)
    uses = measure_use(open_trial(graphs.joint, scratch), evaluation.calibration, gated)
    work = _Work(
        captured=captured,
        graphs=graphs,
        evaluation=replace(evaluation, budget_points=options.prune_experts),
        calibration=evaluation.calibration,
        probe_rows=probe_rows,
        options=options,
        shared=shared_weights([model.graph for model in graphs.models]),
    )
    found: dict[str, PrunedTask] = {}
    told: list[TaskPruning] = []
    for task in captured.tasks:
        use = uses.get(task, ExpertUse((), ()))
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
    if not use.largest:
        return "no gate of it was found, so that nothing tells which experts it uses"
    candidates = use.candidates()
    if not candidates:
        return f"every expert is used: the least has weight up to {min(use.largest):.2f}"
    own = cut_task(work.captured, task)
    freed = freed_by(own, work.captured.sources)
    if not freed:
        return (
            "its graph is left alone: its experts are not joined into one value that only their sum, and layers of the "
            "gate, read"
        )
    spared = {place: [expert for expert in candidates if parts[expert]] for place, parts in enumerate(freed)}
    if not any(spared.values()):
        return f"experts {_listed(candidates)} have little weight, but all that they are made of is read elsewhere too"
    trial = find_trial(own, [place for place in spared if spared[place]], work.calibration, scratch)
    if trial is None:
        return "its graph is left alone: what its joined experts make is not their sum by the routing weights"
    removed = choose_experts(
        spared[trial.place],
        count=trial.count,
        loss=lambda experts: _loss_without(work, task, trial, experts),
        budget=work.evaluation.budget_points,
    )
    while removed:  # rounding may tell the graph itself from the trial
        means = {expert: trial.means[expert] for expert in sorted(removed)}
        graph = _build(work, task, own, trial.place, means)
        if isinstance(graph, str):
            return f"its graph is left alone: {graph}"
        figures = _measure(work, task, graph.model, scratch)
        if work.evaluation.loss_points(figures) <= work.evaluation.budget_points:
            return PrunedTask(
                graph=graph,
                removed=tuple(means),
                place=trial.place,
                expected=trial.run(work.probe_rows, plan_batches(len(work.probe_rows)), means),
                accuracy=accuracy_entry(task, figures, work.evaluation),
                note=doubt_labels(task, figures, "pruning"),
            )
        removed = removed[:-1]
    return (
        f"experts {_listed(spared[trial.place])} have little weight, but without any one of them the task loses more "
        f"than the {work.evaluation.budget_points:g} points allowed"
    )


def _listed(experts: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(experts)))


def _loss_without(work: _Work, task: str, trial: MeansTrial, experts: Sequence[int]) -> float:
    means = {expert: trial.means[expert] for expert in experts}
    figures = work.evaluation.measure_task(task, lambda x: trial.answer(x, means))
    return work.evaluation.loss_points(figures)


def _build(work: _Work, task: str, own: ir.Model, place: int, means: Means) -> JointGraph | str:
    cut = prune_experts(own, place, means, task=task)
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
        removed=pruned.removed,
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

"""Adding to the fp32 variant the graphs of tasks without the experts they hardly use.

fp32 graphs → pruning/prune_tasks.py → structure → (written with the others) → agreement → manifest entries
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from te_export.bundle.staged_graphs import StagedGraphs
from te_export.bundle.staging import StagedBundle
from te_export.capture.joint_graph import JointGraph
from te_export.errors import ParityError
from te_export.models.exportable import ExportableModel
from te_export.options import ExportOptions, TaskPruning
from te_export.partition import GraphSet
from te_export.precision.evaluation import Evaluation
from te_export.pruning.prune_tasks import PrunedTask, prune_tasks
from te_export.verify.graph_runs import GraphRun
from te_export.verify.parity import verify_pruned
from te_export.verify.reachability import check_pruned_reachability
from te_export.verify.references import References
from te_export.verify.structure import check_pruned_structure
from te_runtime.errors import BundleError
from te_runtime.manifest import PrunedGraph, TaskAccuracy

__all__ = ["AddedPruned", "add_pruned", "pruned_entries"]


@dataclass(frozen=True)
class AddedPruned:
    """What came of pruning, empty where it was not asked for.

    Attributes:
        tasks: what was found for every task.
        models, expected, accuracy: of the tasks that have a pruned graph, by name.
        notes: what a person must know.
    """

    tasks: tuple[TaskPruning, ...] = ()
    models: Mapping[str, ir.Model] = field(default_factory=dict)
    expected: Mapping[str, GraphRun] = field(default_factory=dict)
    accuracy: Mapping[str, TaskAccuracy] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def detail(self) -> str:
        removed = sum(len(task.removed) for task in self.tasks)
        return f"{removed} experts less in {len(self.models)} of {len(self.tasks)} tasks"

    def without_models(self) -> AddedPruned:
        """What is kept once the graphs are written: no weights."""
        return replace(self, models={})


def add_pruned(
    staged: StagedBundle,
    captured: JointGraph,
    graphs: GraphSet,
    model: ExportableModel,
    evaluation: Evaluation,
    options: ExportOptions,
    references: References,
) -> AddedPruned:
    """Prune every task within `options.prune_experts`, and prove what each pruned graph depends on.

    Args:
        captured: the joint graph before any rewrite.
        evaluation: with the rows of the calibration data.
        references: with the rows that every graph is proved on.

    Raises:
        StructureError: a pruned graph lost something else than the experts, or did not lose them.
        ParityError: ONNX Runtime cannot run a graph.
        OutputError: the disk is full.
    """
    with staged.scratch() as scratch:
        try:
            told, found = prune_tasks(
                captured,
                graphs,
                evaluation,
                probe_rows=references.rows.x,
                options=options,
                scratch=scratch,
            )
        except BundleError as error:
            raise ParityError(f"--prune-experts: onnxruntime cannot run a graph: {error}") from error
    for pruned in found.values():
        _check(pruned, model, captured)
    return AddedPruned(
        tasks=told,
        models={task: pruned.graph.model for task, pruned in found.items()},
        expected={task: pruned.expected for task, pruned in found.items()},
        accuracy={task: pruned.accuracy for task, pruned in found.items()},
        notes=tuple(pruned.note for pruned in found.values() if pruned.note),
    )


def pruned_entries(
    added: AddedPruned, staged: StagedGraphs, references: References
) -> dict[str, PrunedGraph]:
    """Verify the written graphs; by task, what the manifest says of its pruned graph.

    Raises:
        ParityError: a pruned graph is not what was judged.
    """
    if not added.expected:
        return {}
    parity = verify_pruned(staged, references, added.expected)
    return {
        task.task: PrunedGraph(
            graph=staged.pruned[task.task],
            experts=task.removed,
            largest_weights=tuple(task.use.largest[expert] for expert in task.removed),
            accuracy=added.accuracy[task.task],
            parity=parity[task.task],
        )
        for task in added.tasks
        if task.task in added.expected
    }


def _check(pruned: PrunedTask, model: ExportableModel, captured: JointGraph) -> None:
    check_pruned_reachability(pruned.graph, pruned.place, pruned.removed, model, captured)
    if model.expert_features is not None:
        check_pruned_structure(pruned.graph, pruned.removed, model, captured)

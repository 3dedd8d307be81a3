"""Writing the graphs of one variant and the weights file they share into a staged bundle."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from te_export.bundle.graph_file import WEIGHTS_NAME, linked_bytes, standalone_bytes, tensor_specs
from te_export.bundle.staged_graphs import StagedGraphs
from te_export.bundle.staging import StagedBundle
from te_export.bundle.weights_file import WeightsLayout, plan_weights, weight_chunks
from te_export.partition import GraphSet
from te_runtime.manifest import GraphSpec, TaskGraphs

__all__ = ["write_variant"]


def write_variant(
    staged: StagedBundle,
    graphs: GraphSet,
    *,
    folder: str,
    standalone: bool,
    pruned: Mapping[str, ir.Model] | None = None,
) -> StagedGraphs:
    """Write `<folder>/weights.bin`, joint, trunk, task and tail graphs, the joint tails, and standalone graphs if
    asked for.

    Args:
        pruned: by task that has one, its graph without some experts.

    Raises:
        OutputError: the disk is full or cannot be written; a standalone graph would pass 2 GiB.
    """
    without = pruned or {}
    layout = plan_weights([model.graph for model in (*graphs.models, *without.values())])
    alone = sum(_weight_bytes(model, layout) for model in graphs.tasks.values()) if standalone else 0
    staged.check_room(layout.size_bytes + alone)
    staged.write(f"{folder}/{WEIGHTS_NAME}", weight_chunks(layout))
    tasks = tuple(
        TaskGraphs(
            task=name,
            graph=_write_linked(staged, graphs.tasks[name], f"{folder}/task-{name}.onnx", layout),
            tail=_write_linked(staged, graphs.tails[name], f"{folder}/tail-{name}.onnx", layout)
            if name in graphs.tails
            else _spec(graphs.tasks[name], f"{folder}/task-{name}.onnx"),
            standalone=_write_standalone(staged, graphs.tasks[name], f"{folder}/standalone-{name}.onnx")
            if standalone
            else None,
        )
        for name in graphs.tasks
    )
    shared = {"trunk": graphs.trunk, "joint-tails": graphs.joint_tails}
    written = {
        name: _write_linked(staged, model, f"{folder}/{name}.onnx", layout)
        for name, model in shared.items()
        if model is not None
    }
    return StagedGraphs(
        root=staged.root,
        joint=_write_linked(staged, graphs.joint, f"{folder}/joint.onnx", layout),
        trunk=written.get("trunk"),
        joint_tails=written.get("joint-tails"),
        tasks=tasks,
        task_size_bytes={
            name: _size_alone(staged, model, layout, path=f"{folder}/task-{name}.onnx")
            for name, model in graphs.tasks.items()
        },
        pruned={
            name: _write_linked(staged, model, f"{folder}/pruned-{name}.onnx", layout)
            for name, model in without.items()
        },
    )


def _size_alone(staged: StagedBundle, model: ir.Model, layout: WeightsLayout, *, path: str) -> int:
    return staged.size_bytes(path) + _weight_bytes(model, layout)


def _weight_bytes(model: ir.Model, layout: WeightsLayout) -> int:
    return sum(layout.places[name][1] for name in model.graph.initializers if name in layout.places)


def _write_linked(staged: StagedBundle, model: ir.Model, path: str, layout: WeightsLayout) -> GraphSpec:
    staged.write(path, [linked_bytes(model, layout)])
    return _spec(model, path)


def _write_standalone(staged: StagedBundle, model: ir.Model, path: str) -> GraphSpec:
    staged.write(path, [standalone_bytes(model, path)])
    return _spec(model, path)


def _spec(model: ir.Model, path: str) -> GraphSpec:
    return GraphSpec(
        path=path,
        inputs=tensor_specs(list(model.graph.inputs)),
        outputs=tensor_specs(list(model.graph.outputs)),
    )

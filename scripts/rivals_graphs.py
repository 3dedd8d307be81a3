"""The graphs that rivals and te-export run, made from one model: torch.onnx's of one task and of all tasks, te-export's
bundle, and a single Gemm beside each scope.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from reference_graphs import export_all_tasks, export_naive, write_roof
from rivals_models import Model
from rivals_plan import Device, Family, Scope

import te_export
from te_export.rewrite.graph_cost import measure_cost

NO_BUDGET = 100.0
"""R has random weights, so that its arg-max is a matter of luck."""
BUDGET = 0.5


@dataclass(frozen=True)
class Graphs:
    """Files of one model.

    Attributes:
        naive: torch.onnx.export of the first task.
        all_tasks: torch.onnx.export of all tasks as one graph.
        bundles: te-export's, by the device they were made for.
        roofs: one Gemm of as many weight bytes as te-export's float32 graph of the scope.
        int8: the form that te-export chose, or why there is none.
    """

    naive: Path
    all_tasks: Path
    bundles: Mapping[Device, Path]
    roofs: Mapping[Scope, Path]
    int8: str
    has_int8: bool

    def graph(self, device: Device, scope: Scope, precision: str = "fp32") -> Path:
        """te-export's graph of the first task or of all tasks."""
        name = "task-task_0.onnx" if scope is Scope.ONE_TASK else "joint.onnx"
        return self.bundles[device] / precision / name


def make_graphs(model: Model, folder: Path, *, has_cuda: bool) -> Graphs:
    """Everything that is opened from files, in `folder`."""
    checkpoint = folder / "model.pt"
    torch.save(model.module.state_dict(), checkpoint)
    export_naive(model.module, folder / "naive.onnx")
    export_all_tasks(model.module, folder / "all-tasks.onnx")
    made = te_export.export(checkpoint, folder / "bundle", _int8_options(model, folder))
    bundles: dict[Device, Path] = {"cpu": made.bundle}
    if has_cuda:
        options = te_export.ExportOptions(provider="cuda")
        bundles["cuda"] = te_export.export(checkpoint, folder / "bundle-cuda", options).bundle
    forms = [summary.form for summary in made.variants]
    graphs = Graphs(
        naive=folder / "naive.onnx",
        all_tasks=folder / "all-tasks.onnx",
        bundles=bundles,
        roofs={scope: folder / f"roof-{scope.name.lower()}.onnx" for scope in Scope},
        int8=str(forms[0]) if forms else "; ".join(failed.reason for failed in made.failed_variants),
        has_int8=bool(forms),
    )
    for scope, path in graphs.roofs.items():
        cost = measure_cost(ir.load(graphs.graph("cpu", scope)).graph)
        write_roof(path, cost.weight_bytes, input_dim=model.module.config.input_dim)
    return graphs


def graph_of_task(graphs: Graphs, model: Model, task: int) -> onnx.ModelProto:
    """What torch.onnx.export would give for a task: the first task's graph with the weights of that one."""
    graph = ir.load(graphs.naive)
    state = model.module.state_dict()
    for name, value in graph.graph.initializers.items():
        if name.startswith("model."):
            own = name.removeprefix("model.")
            for part in ("gating_networks", "task_heads"):
                own = own.replace(f"{part}.0.", f"{part}.{task}.")
            weight = state[own].numpy()
            value.const_value = ir.tensor(weight, name=name)
            value.shape = ir.Shape(weight.shape)
    batch, _ = graph.graph.outputs[0].shape or (None, None)
    graph.graph.outputs[0].shape = ir.Shape([batch, model.module.config.task_output_dims[task]])
    return ir.to_proto(graph)


def _int8_options(model: Model, folder: Path) -> te_export.ExportOptions:
    rows = folder / "rows.npz"
    np.savez(rows, x=model.rows)
    budget = NO_BUDGET if model.choice.family is Family.R else BUDGET
    return te_export.ExportOptions(
        precisions=("fp32", "int8"), calibration_data=rows, max_accuracy_drop=budget
    )

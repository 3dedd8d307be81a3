"""Putting together what manifest.json says of a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnxruntime
import onnxscript
import torch

from te_export.bundle.graph_file import WEIGHTS_NAME
from te_export.bundle.staged_graphs import StagedGraphs
from te_export.models.exportable import ExportableModel
from te_export.version import VERSION
from te_runtime.manifest import (
    FORMAT_NAME,
    FORMAT_VERSION,
    FileEntry,
    FormName,
    Golden,
    GraphSpec,
    Latency,
    LayerAccuracy,
    Manifest,
    ModelInfo,
    OptimizeLevel,
    Precision,
    Producer,
    PrunedGraph,
    TargetProvider,
    TaskAccuracy,
    TaskParity,
    TaskSpec,
    TaskUtilization,
    TensorSpec,
    Variant,
)

__all__ = ["build_manifest", "build_variant", "model_info"]


def build_variant(
    precision: Precision,
    graphs: StagedGraphs,
    parity: tuple[TaskParity, ...],
    *,
    optimized: OptimizeLevel,
    target_provider: TargetProvider,
    form: FormName = "float32",
    kept_weights: tuple[str, ...] = (),
    accuracy: tuple[TaskAccuracy, ...] = (),
    layers: tuple[LayerAccuracy, ...] = (),
    pruned: Mapping[str, PrunedGraph] | None = None,
) -> Variant:
    """The manifest's entry for one verified variant."""
    without = pruned or {}
    return Variant(
        precision=precision,
        form=form,
        optimized=optimized,
        target_provider=target_provider,
        weights=f"{precision}/{WEIGHTS_NAME}",
        joint=graphs.joint,
        trunk=graphs.trunk,
        joint_tails=graphs.joint_tails,
        tasks=tuple(task._replace(pruned=without.get(task.task)) for task in graphs.tasks),
        kept_weights=kept_weights,
        accuracy=accuracy,
        parity=parity,
        layers=layers,
    )


def model_info(model: ExportableModel, checkpoint_sha256: str) -> ModelInfo:
    """What the manifest keeps of the model; it holds no weights."""
    return ModelInfo(
        family=model.family,
        config=model.config,
        checkpoint_sha256=checkpoint_sha256,
        parameter_bytes=model.parameter_bytes,
        unused_parameters=model.unused_parameters,
    )


def build_manifest(
    info: ModelInfo,
    *,
    opset: int,
    variants: Sequence[Variant],
    golden: Golden,
    utilization: tuple[TaskUtilization, ...],
    files: tuple[FileEntry, ...],
    latency: Latency | None = None,
) -> Manifest:
    """The manifest of a bundle; it holds no times but `latency`, and no paths of the machine that wrote it."""
    first = variants[0]
    return Manifest(
        format=FORMAT_NAME,
        version=FORMAT_VERSION,
        checksum="",  # serialize_manifest fills it in
        model=info,
        producer=Producer(
            te_export=VERSION,
            torch=str(torch.__version__),
            onnx=onnx.__version__,
            onnxscript=onnxscript.__version__,
            onnxruntime=onnxruntime.__version__,
            opset=opset,
        ),
        inputs=first.joint.inputs,
        tasks=tuple(_task_spec(task.task, task.graph) for task in first.tasks),
        variants=tuple(variants),
        golden=golden,
        utilization=utilization,
        files=files,
        latency=latency,
    )


def _task_spec(name: str, graph: GraphSpec) -> TaskSpec:
    prediction, *weights = (
        TensorSpec(f"{name}.{output.name}", output.dtype, output.shape) for output in graph.outputs
    )
    return TaskSpec(name=name, prediction=prediction, routing_weights=weights[0] if weights else None)

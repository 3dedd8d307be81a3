"""Exports one library model and prints, as JSON, everything the tests judge it by.

    python check_library_model.py NAME FOLDER

Runs in an environment that has the libraries; the bundle is made in FOLDER. The module's own answers come from the
library's forward and from forward hooks on its gates, in float32 and in float64.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import torch
from float64_oracle import evaluate_float64
from library_model import Inputs, LibraryModel
from numpy.typing import NDArray
from torch import Tensor, nn

import te_export
import te_runtime
from te_runtime.manifest import Manifest, OutputParity
from te_runtime.plan import Mode

BATCHES = (1, 2, 7, 64)
MODES: tuple[Mode, ...] = ("joint", "split", "task")
BASELINE_OPSET = 18


@dataclass(frozen=True)
class Error:
    """How far one output of one graph is from float64, and how far it may be."""

    task: str
    mode: str
    rows: int
    largest: float
    torch_largest: float
    bound: float


@dataclass(frozen=True)
class Weights:
    """Routing weights of a task: how far from the library's own gate, and their sums from one."""

    task: str
    errors: tuple[Error, ...]
    largest_sum_error: float
    experts: int


@dataclass(frozen=True)
class Size:
    nodes: int
    parameters: int


@dataclass(frozen=True)
class TaskSize:
    """A task's graph beside what onnx.utils.extract_model cuts out of torch's own export of the module."""

    task: str
    graph: Size
    extracted: Size
    spare_numbers: int
    needs_whole_model: bool


@dataclass(frozen=True)
class Captures:
    traces: int
    graphs: int


@dataclass(frozen=True)
class Findings:
    name: str
    tasks: tuple[str, ...]
    gated_tasks: tuple[str, ...]
    optional_gates: dict[str, int]
    found_gates: tuple[str, ...]
    predictions: tuple[Error, ...]
    weights: tuple[Weights, ...]
    joint: Size
    sizes: tuple[TaskSize, ...]
    captures: Captures
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Answers:
    """Of one forward: each task's prediction (B, out), and the gates' outputs (B, K) of those that have one."""

    predictions: dict[str, NDArray[np.generic]]
    gates: dict[str, NDArray[np.generic]]


def find_model(name: str) -> LibraryModel:
    library = importlib.import_module(f"{name.partition('-')[0]}_models")
    builders = next(value for key, value in vars(library).items() if key.endswith("_MODELS"))
    model: LibraryModel = builders[name]()
    return model


def answer(model: LibraryModel, module: nn.Module, inputs: Inputs) -> Answers:
    """Run the library's forward and listen at its gates."""
    gates: dict[str, Tensor] = {}
    handles = [
        module.get_submodule(path).register_forward_hook(
            lambda _module, _inputs, output, task=task: gates.update({task: output})
        )
        for task, path in model.gates.items()
    ]
    with torch.no_grad():
        output = module(inputs)
    for handle in handles:
        handle.remove()
    if model.fused_output:
        output = {task: output[:, [column]] for column, task in enumerate(model.task_names)}
    return Answers(
        {task: tensor.numpy() for task, tensor in output.items()},
        {task: tensor.numpy() for task, tensor in gates.items()},
    )


def arrays(inputs: Inputs) -> NDArray[np.generic] | dict[str, NDArray[np.generic]]:
    if isinstance(inputs, dict):
        return {name: tensor.numpy() for name, tensor in inputs.items()}
    return inputs.numpy()


def largest(difference: NDArray[np.generic]) -> float:
    return float(np.abs(difference).max())


def ordinary_bound(parity: OutputParity) -> float:
    return max(group.bound for group in parity.groups if group.group == "ordinary")


def predict(bundle: Path, loaded: te_runtime.Model, x: Any) -> dict[str, te_runtime.Prediction]:
    """All tasks; in mode task each by its own graph, which a model has that is asked for one task and no other."""
    if loaded.plan.mode != "task":
        return loaded.predict(x)
    found = {}
    for task in loaded.tasks:
        with te_runtime.load(bundle, mode="task", threads=1) as own:
            found |= own.predict(x, [task])
    return found


def compare(
    model: LibraryModel, bundle: Path, manifest: Manifest
) -> tuple[tuple[Error, ...], tuple[Weights, ...]]:
    """Every mode of te_runtime at every batch size, against the library's module on fresh rows."""
    parity = {entry.task: entry for entry in manifest.variants[0].parity}
    predictions: list[Error] = []
    gates: dict[str, list[Error]] = {}
    sums: dict[str, list[float]] = {}
    experts: dict[str, int] = {}
    for mode in MODES:
        with te_runtime.load(bundle, mode=mode, threads=1) as loaded:
            for rows in BATCHES:
                inputs = model.make_rows(rows, 1000 + rows)
                torch_says = answer(model, model.module, inputs)
                exact = evaluate_float64(model.module, inputs, lambda module, x: answer(model, module, x))
                found = predict(bundle, loaded, arrays(inputs))
                for task, prediction in found.items():

                    def error(
                        got: NDArray[np.generic],
                        own: NDArray[np.generic],
                        oracle: NDArray[np.generic],
                        judged: OutputParity,
                        task: str = task,
                        where: tuple[str, int] = (mode, rows),
                    ) -> Error:
                        assert got.shape == oracle.shape, f"{task}: {got.shape}, expected {oracle.shape}"
                        torch_error = largest(own - oracle)
                        bound = max(4.0 * torch_error, ordinary_bound(judged))
                        return Error(task, *where, largest(got - oracle), torch_error, bound)

                    predictions.append(
                        error(
                            prediction.output,
                            torch_says.predictions[task],
                            exact.predictions[task],
                            parity[task].prediction,
                        )
                    )
                    weights, judged = prediction.routing_weights, parity[task].routing_weights
                    if weights is None or judged is None:
                        continue
                    sums.setdefault(task, []).append(largest(weights.sum(axis=1) - 1.0))
                    experts[task] = weights.shape[1]
                    if task in model.gates:
                        gates.setdefault(task, []).append(
                            error(weights, torch_says.gates[task], exact.gates[task], judged)
                        )
    weights_found = tuple(
        Weights(task, tuple(gates.get(task, ())), max(errors), experts[task]) for task, errors in sums.items()
    )
    return tuple(predictions), weights_found


def size_of(path: Path) -> Size:
    graph = onnx.load(path, load_external_data=False).graph
    return Size(
        nodes=sum(node.op_type != "Constant" for node in graph.node),
        parameters=sum(int(np.prod(tensor.dims)) for tensor in graph.initializer),
    )


def extract_tasks(model: LibraryModel, folder: Path) -> dict[str, Size]:
    """What a user would do without te_export: torch's export of the whole module, cut for each output."""
    joint = folder / "baseline.onnx"
    inputs = model.example_inputs
    batch = torch.export.Dim("batch")
    axes = {name: {0: batch} for name in inputs} if isinstance(inputs, dict) else {0: batch}
    torch.onnx.export(
        model.module,
        (inputs, {}),  # a dict that comes last would be taken for keyword arguments
        joint,
        dynamo=True,
        opset_version=BASELINE_OPSET,
        dynamic_shapes=(axes,),
        external_data=False,
        verbose=False,
    )
    graph = onnx.load(joint).graph
    names = [value.name for value in graph.output]
    sizes = {}
    for index, task in enumerate(model.task_names):
        cut = folder / f"baseline-{task}.onnx"
        output = names[0] if model.fused_output else names[index]
        onnx.utils.extract_model(joint, cut, [value.name for value in graph.input], [output])
        sizes[task] = size_of(cut)
    return sizes


def export_counting(model: LibraryModel, bundle: Path) -> tuple[te_export.ExportResult, Captures]:
    """The export, and how many times it asked torch for a trace and for an ONNX graph."""
    with (
        patch.object(torch.export, "export", wraps=torch.export.export) as traces,
        patch.object(torch.onnx, "export", wraps=torch.onnx.export) as graphs,
    ):
        result = te_export.export(
            model.module, bundle, example_inputs=model.example_inputs, task_names=model.task_names
        )
    return result, Captures(traces.call_count, graphs.call_count)


def task_sizes(
    model: LibraryModel, bundle: Path, manifest: Manifest, extracted: Mapping[str, Size]
) -> tuple[TaskSize, ...]:
    return tuple(
        TaskSize(
            entry.task,
            size_of(bundle / entry.graph.path),
            extracted[entry.task],
            model.spare_numbers,
            entry.task in model.needs_whole_model,
        )
        for entry in manifest.variants[0].tasks
    )


def check(name: str, folder: Path) -> Findings:
    model = find_model(name)
    result, captures = export_counting(model, folder / "bundle")
    predictions, weights = compare(model, result.bundle, result.manifest)
    return Findings(
        name=name,
        tasks=result.manifest.task_names,
        gated_tasks=tuple(model.gates),
        optional_gates=dict(model.optional_gates),
        found_gates=tuple(task.name for task in result.manifest.tasks if task.routing_weights is not None),
        predictions=predictions,
        weights=weights,
        joint=size_of(result.bundle / result.manifest.variants[0].joint.path),
        sizes=task_sizes(model, result.bundle, result.manifest, extract_tasks(model, folder)),
        captures=captures,
        notes=result.notes,
    )


def main() -> None:
    warnings.simplefilter("ignore")  # torch's own, and the libraries'
    torch.set_num_threads(1)
    name, folder = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(asdict(check(name, folder))))


if __name__ == "__main__":
    main()

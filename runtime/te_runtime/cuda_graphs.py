"""Batches of fixed sizes as CUDA graphs: every launch of a run recorded once, replayed as one.

A recording holds addresses, so each batch size keeps its inputs, its intermediates and its outputs on the device
for as long as the model lives, and calls take turns. onnxruntime keeps recordings per thread and cannot record while
other work is under way on the device (core/providers/cuda/cuda_graph.cc), so the model has one thread that
everything runs on, and every size is recorded when the model is loaded: load it before other models predict. So
every graph of the mode is loaded then too: tails, and the joint tails beside them.
Batches of any other size run as DeviceExecutor runs them, on the same thread.
The documentation of onnxruntime's CUDA provider calls this `gpu_graph_id`: -1 leaves a run out of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from te_runtime.device_executor import Device, DeviceExecutor, DeviceGraphs, distinct_sessions
from te_runtime.errors import InputError
from te_runtime.manifest import TensorSpec
from te_runtime.onnxruntime_install import import_onnxruntime
from te_runtime.prediction import Prediction
from te_runtime.row_parts import RowPart, pick_parts
from te_runtime.session import OrtSession

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

    from te_runtime.session_types import Binding

__all__ = ["GraphExecutor"]

_NOT_RECORDED = "-1"


@dataclass(frozen=True, slots=True)
class _Bound:
    """One graph bound to fixed values, with the options that name its recording."""

    session: OrtSession
    binding: Binding
    outputs: tuple[Any, ...]
    run_options: object

    def run(self) -> None:
        self.session.run_bound(self.binding, self.run_options)


@dataclass(frozen=True, slots=True)
class _FixedBatch:
    """Everything one batch size holds on the device."""

    inputs: Mapping[str, Any]
    trunk: _Bound | None
    answers: Mapping[OrtSession, _Bound]


class GraphExecutor:
    """An Executor that replays recordings for the batch sizes it was given."""

    __slots__ = ("_batches", "_graphs", "_other", "_thread")

    def __init__(
        self, graphs: DeviceGraphs, device: Device, inputs: Sequence[TensorSpec], batch_sizes: Sequence[int]
    ) -> None:
        """Make room on the device for each batch size, and record it.

        Raises:
            InputError: a graph has another open axis than the batch.
            BundleError: a graph failed while it ran.
        """
        ort = import_onnxruntime()
        self._graphs = graphs
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="te_runtime-cuda")
        self._other = DeviceExecutor(graphs, device, _options(ort, _NOT_RECORDED))
        self._batches = {
            rows: _fix_batch(ort, graphs, device, inputs, rows=rows, recording=number)
            for number, rows in enumerate(batch_sizes, start=1)
        }
        tasks = tuple(graphs.answers)
        for rows in batch_sizes:
            zeros = {spec.name: _zeros(spec, rows) for spec in inputs}
            self.run(zeros, rows, tasks)
            for task in tasks if graphs.joint_answers else ():  # whose tails have not run
                self.run(zeros, rows, (task,))

    def run(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, tasks: Sequence[str]
    ) -> dict[str, Prediction]:
        """As Executor.run."""
        return self._thread.submit(self._run_here, feeds, rows, tasks).result()

    def run_parts(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, parts: Sequence[RowPart]
    ) -> list[Prediction]:
        """As Executor.run_parts. Recordings are for whole batches, so every tail runs for every row."""
        return pick_parts(self.run(feeds, rows, [part.task for part in parts]), parts)

    def prepare(self, tasks: Sequence[str]) -> None:
        """As Executor.prepare: everything is loaded from the start."""

    def _run_here(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, tasks: Sequence[str]
    ) -> dict[str, Prediction]:
        batch = self._batches.get(rows)
        if batch is None:
            return self._other.run(feeds, rows, tasks)
        for name, array in feeds.items():
            batch.inputs[name].update_inplace(array)
        if batch.trunk is not None:
            batch.trunk.run()
        answers = self._graphs.answers_for(tasks)
        sessions = [session.get() for session in distinct_sessions(answers.values())]
        for session in sessions:
            batch.answers[session].run()
        # The next call writes into the same values, so the answers are copies.
        outputs = {
            session: [np.array(value.numpy()) for value in batch.answers[session].outputs]
            for session in sessions
        }
        return {
            task: answer.reader.read(outputs[answer.session.get()], rows) for task, answer in answers.items()
        }


def _fix_batch(
    ort: ModuleType,
    graphs: DeviceGraphs,
    device: Device,
    inputs: Sequence[TensorSpec],
    *,
    rows: int,
    recording: int,
) -> _FixedBatch:
    options = _options(ort, str(recording))
    values = {spec.name: _room(ort, spec, device, rows) for spec in inputs}
    fixed_inputs = dict(values)
    trunk = None
    if graphs.trunk is not None:
        trunk = _bind(ort, graphs.trunk, values, device, rows=rows, options=options)
        names = (spec.name for spec in graphs.trunk.spec.outputs)
        values |= dict(zip(names, trunk.outputs, strict=True))
    sessions = [session.get() for session in graphs.deferred]
    bound = {session: _bind(ort, session, values, device, rows=rows, options=options) for session in sessions}
    return _FixedBatch(fixed_inputs, trunk, bound)


def _bind(
    ort: ModuleType,
    session: OrtSession,
    values: Mapping[str, Any],
    device: Device,
    *,
    rows: int,
    options: object,
) -> _Bound:
    binding = session.new_binding()
    for spec in session.spec.inputs:
        binding.bind_ortvalue_input(spec.name, values[spec.name])
    outputs = tuple(_room(ort, spec, device, rows) for spec in session.spec.outputs)
    for spec, value in zip(session.spec.outputs, outputs, strict=True):
        binding.bind_ortvalue_output(spec.name, value)
    return _Bound(session, binding, outputs, options)


def _room(ort: ModuleType, spec: TensorSpec, device: Device, rows: int) -> Any:
    """An uninitialized value on the device, the shape of `spec` with its batch axis set to `rows`."""
    fixed = [axis for axis in spec.shape[1:] if isinstance(axis, int)]
    if len(fixed) != len(spec.shape) - 1:
        raise InputError(
            f"graph_batch_sizes: {spec.name!r} has the open axes {', '.join(map(str, spec.shape))}, and a "
            "CUDA graph needs every axis but the batch fixed. Load the model without graph_batch_sizes."
        )
    return ort.OrtValue.ortvalue_from_shape_and_type(
        [rows, *fixed], np.dtype(spec.dtype).type, device.kind, device.number
    )


def _zeros(spec: TensorSpec, rows: int) -> NDArray[np.generic]:
    fixed = [axis for axis in spec.shape[1:] if isinstance(axis, int)]
    return np.zeros((rows, *fixed), dtype=spec.dtype)


def _options(ort: ModuleType, recording: str) -> object:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", recording)
    return options

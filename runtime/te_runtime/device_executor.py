"""Runs the graphs of one plan on a device, with the values between the graphs left there.

The inputs are copied to the device once per call, however many graphs read them; the trunk's outputs stay there
and are the tails' inputs; the predictions are copied back at the end. Each call has bindings of its own, since
onnxruntime's are for one thread at a time. The device may be the CPU, which is how this code is tested where
there is no GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from te_runtime.answers import TaskReader
from te_runtime.manifest import TaskSpec
from te_runtime.onnxruntime_install import import_onnxruntime
from te_runtime.prediction import Prediction
from te_runtime.row_parts import RowPart, pick_parts
from te_runtime.session import OrtSession

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from te_runtime.providers import Provider

__all__ = ["Answer", "Device", "DeviceExecutor", "DeviceGraphs"]


@dataclass(frozen=True, slots=True)
class Device:
    """Where values live, in onnxruntime's words."""

    kind: Literal["cpu", "cuda"]
    number: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """The graph that answers one task, and where its outputs hold the answer. Tasks may share a graph."""

    session: OrtSession
    reader: TaskReader

    @classmethod
    def of(cls, session: OrtSession, task: TaskSpec, provider: Provider) -> Answer:
        """The answer of `task` in the graph that `session` runs."""
        return cls(session, TaskReader(session.spec, task, provider))


@dataclass(frozen=True, slots=True)
class DeviceGraphs:
    """The loaded graphs of any mode: the trunk, if there is one, and what answers each task."""

    trunk: OrtSession | None
    answers: Mapping[str, Answer]


class DeviceExecutor:
    """An Executor whose values stay on the device between graphs."""

    __slots__ = ("_device", "_graphs", "_ort", "_run_options")

    def __init__(self, graphs: DeviceGraphs, device: Device, run_options: object = None) -> None:
        """Wrap loaded graphs.

        Args:
            graphs: the graphs, loaded for `device`.
            device: where their values live.
            run_options: an onnxruntime.RunOptions for every run, or None.
        """
        self._graphs = graphs
        self._device = device
        self._run_options = run_options
        self._ort = import_onnxruntime()

    def run(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, tasks: Sequence[str]
    ) -> dict[str, Prediction]:
        """As Executor.run."""
        answers = self._graphs.answers
        if rows == 0:
            return {task: answers[task].reader.empty() for task in tasks}
        place = self._ort.OrtValue.ortvalue_from_numpy
        values = {name: place(array, self._device.kind, self._device.number) for name, array in feeds.items()}
        if self._graphs.trunk is not None:
            values |= self._run_graph(self._graphs.trunk, values)
        sessions = dict.fromkeys(answers[task].session for task in tasks)
        found = {session: self._run_graph(session, values) for session in sessions}
        outputs = {session: [value.numpy() for value in made.values()] for session, made in found.items()}
        return {task: answers[task].reader.read(outputs[answers[task].session], rows) for task in tasks}

    def run_parts(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, parts: Sequence[RowPart]
    ) -> list[Prediction]:
        """As Executor.run_parts. Every tail runs for every row: what lies on the device is not cut here."""
        return pick_parts(self.run(feeds, rows, [part.task for part in parts]), parts)

    def _run_graph(self, session: OrtSession, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run one graph on values of the device; its outputs stay there, in the order of its spec."""
        binding = session.new_binding()
        for spec in session.spec.inputs:
            binding.bind_ortvalue_input(spec.name, values[spec.name])
        for spec in session.spec.outputs:
            binding.bind_output(spec.name, self._device.kind, self._device.number)
        session.run_bound(binding, self._run_options)
        names = (spec.name for spec in session.spec.outputs)
        return dict(zip(names, binding.get_outputs(), strict=True))

"""Runs the graphs of one plan on a device, with the values between the graphs left there.

The inputs are copied to the device once per call, however many graphs read them; the trunk's outputs stay there
and are the tails' inputs; the predictions are copied back at the end. Each call has bindings of its own, since
onnxruntime's are for one thread at a time. Graphs of tasks are loaded when they are first needed. The device may
be the CPU, which is how this code is tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from te_runtime.answers import TaskReader
from te_runtime.deferred_session import DeferredSession
from te_runtime.manifest import TaskSpec
from te_runtime.onnxruntime_install import import_onnxruntime
from te_runtime.plan import takes_joint_tails
from te_runtime.prediction import Prediction
from te_runtime.row_parts import RowPart, pick_parts
from te_runtime.session import OrtSession

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from te_runtime.providers import Provider

__all__ = ["Answer", "Device", "DeviceExecutor", "DeviceGraphs", "distinct_sessions"]


@dataclass(frozen=True, slots=True)
class Device:
    """Where values live, in onnxruntime's words."""

    kind: Literal["cpu", "cuda"]
    number: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """The graph that answers one task, and where its outputs hold the answer. Tasks may share a graph."""

    session: DeferredSession[OrtSession]
    reader: TaskReader

    @classmethod
    def of(cls, session: DeferredSession[OrtSession], task: TaskSpec, provider: Provider) -> Answer:
        """The answer of `task` in the graph that `session` runs."""
        return cls(session, TaskReader(session.spec, task, provider))


@dataclass(frozen=True, slots=True)
class DeviceGraphs:
    """The graphs of any mode: the trunk, if there is one, and what answers each task.

    Attributes:
        joint_answers: the same, by the joint tails; empty where there are none.
    """

    trunk: OrtSession | None
    answers: Mapping[str, Answer]
    joint_answers: Mapping[str, Answer] = field(default_factory=dict)

    def answers_for(self, tasks: Sequence[str]) -> dict[str, Answer]:
        """What answers these tasks, in their order."""
        joint = self.joint_answers and takes_joint_tails(len(tasks), of=len(self.answers))
        known = self.joint_answers if joint else self.answers
        return {task: known[task] for task in tasks}

    @property
    def deferred(self) -> tuple[DeferredSession[OrtSession], ...]:
        """Every graph that may still have to be loaded, once."""
        return distinct_sessions([*self.answers.values(), *self.joint_answers.values()])


def distinct_sessions(answers: Iterable[Answer]) -> tuple[DeferredSession[OrtSession], ...]:
    """The graphs of some answers, each once, in their order."""
    return tuple(dict.fromkeys(answer.session for answer in answers))


class DeviceExecutor:
    """An Executor whose values stay on the device between graphs."""

    __slots__ = ("_device", "_graphs", "_ort", "_run_options")

    def __init__(self, graphs: DeviceGraphs, device: Device, run_options: object = None) -> None:
        """Wrap graphs.

        Args:
            graphs: the graphs, which load for `device`.
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
        answers = self._graphs.answers_for(tasks)
        if rows == 0:
            return {task: answer.reader.empty() for task, answer in answers.items()}
        sessions = distinct_sessions(answers.values())
        loaded = [session.get() for session in sessions]
        place = self._ort.OrtValue.ortvalue_from_numpy
        values = {name: place(array, self._device.kind, self._device.number) for name, array in feeds.items()}
        if self._graphs.trunk is not None:
            values |= self._run_graph(self._graphs.trunk, values)
        found = [self._run_graph(session, values) for session in loaded]
        outputs = [[value.numpy() for value in made.values()] for made in found]
        of_session = dict(zip(sessions, outputs, strict=True))
        return {
            task: answer.reader.read(of_session[answer.session], rows) for task, answer in answers.items()
        }

    def prepare(self, tasks: Sequence[str]) -> None:
        """As Executor.prepare."""
        for session in distinct_sessions(self._graphs.answers_for(tasks).values()):
            session.get()

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

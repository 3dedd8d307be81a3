"""Who is measured: each subject's name, what it answers, in what precision, and how it is opened.

All get the same rows as a numpy array and give float32 numpy arrays, one for each task they answer; all get the same
number of threads. Beyond that each is used in the way its makers recommend for repeated calls.

    rivals_onnxruntime.py   torch.onnx and onnxslim in ONNX Runtime, te-export's graphs, the roof
    rivals_openvino.py      OpenVINO
    rivals_torch.py         torch eager and torch.compile
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from rivals_onnxruntime import (
    open_all_tasks_graph,
    open_naive,
    open_roof,
    open_slimmed,
    open_te_export,
    open_te_runtime,
)
from rivals_opening import Opened, Setting
from rivals_openvino import open_openvino, open_openvino_on_ours
from rivals_parity import Precision
from rivals_plan import Device, ModelChoice, Scope
from rivals_torch import open_compiled, open_eager

CPU_ONLY: tuple[Device, ...] = ("cpu",)
EVERYWHERE: tuple[Device, ...] = ("cpu", "cuda")
ONE_BY_ONE_TASKS = 20
"""A hundred sessions are opened for the naive way only."""
COMPILED_TASKS = 20
"""What torch.compile writes grows with the tasks, and so does the time a C++ compiler takes."""


class Role(StrEnum):
    """What a subject is to the others."""

    NAIVE = "naive"
    RIVAL = "rival"
    OURS = "te-export"
    OURS_ELSEWHERE = "te-export's graph, in a rival"
    ROOF = "roof"


@dataclass(frozen=True)
class Subject:
    """Somebody to measure.

    Attributes:
        name: the same for both scopes.
        open: may raise anything; what it says is told to the reader.
        most_tasks: left out where there are more, for `too_many`.
    """

    name: str
    scope: Scope
    role: Role
    precision: Precision
    open: Callable[[Setting], Opened]
    devices: tuple[Device, ...] = CPU_ONLY
    most_tasks: int | None = None
    too_many: str = ""

    @property
    def label(self) -> str:
        return f"{self.name}, {self.scope}"

    @property
    def is_needed(self) -> bool:
        """Whether the benchmark says nothing without it. What int8 loses depends on the model, so it may be missing."""
        return self.role in (Role.NAIVE, Role.OURS, Role.ROOF) and self.precision == "float32"

    def left_out(self, model: ModelChoice) -> str | None:
        """Why this subject is not measured on a model, by plan."""
        if self.most_tasks is None or model.tasks <= self.most_tasks or self.scope is Scope.ONE_TASK:
            return None
        return self.too_many


def subjects_on(device: Device) -> list[Subject]:
    """All that run there, those of one task first."""
    return [subject for scope in Scope for subject in _subjects(scope) if device in subject.devices]


def _subjects(scope: Scope) -> list[Subject]:
    is_one = scope is Scope.ONE_TASK
    sessions = "" if is_one else ", a session per task"
    graph = "task graph" if is_one else "joint graph"
    found = [
        Subject(f"naive{sessions}", scope, Role.NAIVE, "float32", open_naive, EVERYWHERE),
        Subject("torch eager", scope, Role.RIVAL, "float32", open_eager, EVERYWHERE),
        Subject("torch.compile", scope, Role.RIVAL, "float32", open_compiled,
                most_tasks=COMPILED_TASKS, too_many="compiling takes minutes for so many tasks"),
        Subject(f"onnxslim{sessions}", scope, Role.RIVAL, "float32", open_slimmed,
                most_tasks=ONE_BY_ONE_TASKS, too_many="so many sessions are opened for naive only"),
        Subject("OpenVINO, float32", scope, Role.RIVAL, "float32", partial(open_openvino, precision="f32")),
        Subject("OpenVINO, bfloat16", scope, Role.RIVAL, "bfloat16", partial(open_openvino, precision="bf16")),
        Subject(f"te-export {graph}", scope, Role.OURS, "float32", open_te_export, EVERYWHERE),
        Subject("te_runtime, split", scope, Role.OURS, "float32", open_te_runtime, EVERYWHERE),
        Subject(f"te-export {graph}, int8", scope, Role.OURS, "int8", partial(open_te_export, precision="int8")),
        Subject(f"te-export {graph}, in OpenVINO float32", scope, Role.OURS_ELSEWHERE, "float32",
                open_openvino_on_ours),
        Subject("roof", scope, Role.ROOF, "float32", open_roof, EVERYWHERE),
    ]  # fmt: skip
    if not is_one:
        together = Subject("torch.onnx, all tasks in one graph", scope, Role.RIVAL, "float32",
                           open_all_tasks_graph, EVERYWHERE)  # fmt: skip
        found.insert(1, together)
    return found

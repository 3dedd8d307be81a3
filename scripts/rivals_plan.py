"""Which models, batch sizes and threads the rivals are measured at. Not every combination: from one base point, one
number at a time is changed.

    base      R with K = 8 experts and T = 5 tasks, every batch size, one thread and two
    tasks     T = 1, 20, 100 with K = 8, every batch size, one thread
    experts   K = 4, 32 with T = 5, every batch size, one thread
    trained   a model trained on handwritten digits (K = 6, T = 4), every batch size, one thread
    CUDA      R with K = 8 and T = 5, and the trained model, every batch size, where a GPU works

B batch, T tasks, K experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Device = Literal["cpu", "cuda"]
BATCH_SIZES = (1, 8, 64, 512)
QUICK_BATCH_SIZES = (1, 64)
THREADED_FACTOR = 4
SWEPT_TASKS = (1, 20, 100)
SWEPT_EXPERTS = (4, 32)


class Scope(StrEnum):
    """What one call answers: predictions of the first task, or of every task."""

    ONE_TASK = "one task"
    ALL_TASKS = "all tasks"


class Family(StrEnum):
    """Where a model's weights come from: drawn, or trained on digits."""

    R = "R"
    TRAINED = "trained on digits"


@dataclass(frozen=True)
class ModelChoice:
    """A model, by its family and its number of tasks and experts."""

    family: Family
    tasks: int
    experts: int

    @property
    def label(self) -> str:
        return f"{self.family}, K = {self.experts}, T = {self.tasks}"


BASE = ModelChoice(Family.R, tasks=5, experts=8)
TRAINED = ModelChoice(Family.TRAINED, tasks=4, experts=6)


@dataclass(frozen=True)
class Block:
    """Points that share what was opened: a model on a device with as many threads, at several batch sizes."""

    model: ModelChoice
    batches: tuple[int, ...]
    threads: int = 1
    device: Device = "cpu"

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple(Point(self.model, self.threads, self.device, batch) for batch in self.batches)


@dataclass(frozen=True)
class Point:
    """What all subjects are measured at side by side, in one interleaved run."""

    model: ModelChoice
    threads: int
    device: Device
    batch: int

    @property
    def label(self) -> str:
        return f"{self.model.label}, {device_label(self.device, self.threads)}, B = {self.batch}"


@dataclass(frozen=True)
class Plan:
    """Blocks in the order they are run, those of one model one after another, and how long a point takes.

    Attributes:
        seconds: for each point with one thread, once everything is warm.
        least_rounds: run even where they take longer.
    """

    blocks: tuple[Block, ...]
    seconds: float
    least_rounds: int

    def seconds_of(self, block: Block) -> float:
        """More where turns wait for each other's threads to fall asleep."""
        return self.seconds * (THREADED_FACTOR if block.threads > 1 else 1)

    @property
    def point_count(self) -> int:
        return sum(len(block.batches) for block in self.blocks)


def make_plan(*, quick: bool, has_cuda: bool) -> Plan:
    """The plan above; `quick` keeps one or two batch sizes of the base and of the trained model."""
    devices: tuple[Device, ...] = ("cpu", "cuda") if has_cuda else ("cpu",)
    if quick:
        blocks = tuple(_quick_blocks(devices))
        return Plan(blocks, seconds=1.0, least_rounds=3)
    return Plan(tuple(_full_blocks(devices)), seconds=20.0, least_rounds=9)


def device_label(device: Device, threads: int) -> str:
    """`1 thread`, `2 threads`, `CUDA`."""
    if device == "cuda":
        return "CUDA"
    return f"{threads} thread{'' if threads == 1 else 's'}"


def _quick_blocks(devices: tuple[Device, ...]) -> Iterator[Block]:
    yield Block(BASE, QUICK_BATCH_SIZES)
    yield Block(BASE, QUICK_BATCH_SIZES[-1:], threads=2)
    if "cuda" in devices:
        yield Block(BASE, QUICK_BATCH_SIZES, device="cuda")
    yield Block(TRAINED, QUICK_BATCH_SIZES[:1])


def _full_blocks(devices: tuple[Device, ...]) -> Iterator[Block]:
    yield Block(BASE, BATCH_SIZES)
    yield Block(BASE, BATCH_SIZES, threads=2)
    if "cuda" in devices:
        yield Block(BASE, BATCH_SIZES, device="cuda")
    for device in devices:
        yield Block(TRAINED, BATCH_SIZES, device=device)
    for tasks in SWEPT_TASKS:
        yield Block(ModelChoice(Family.R, tasks=tasks, experts=BASE.experts), BATCH_SIZES)
    for experts in SWEPT_EXPERTS:
        yield Block(ModelChoice(Family.R, tasks=BASE.tasks, experts=experts), BATCH_SIZES)

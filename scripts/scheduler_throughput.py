"""How many one-row requests a second: through the scheduler, by sessions called directly, and offline at the best batch."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from scheduler_load import Client, Rate, Stream, WindowClient, drive

import te_runtime

__all__ = ["CLIENTS", "PRECISIONS", "WIDTH", "Case", "Measured", "best", "measure_throughput"]

PRECISIONS = ("fp32", "int8")
CLIENTS = (1, 2, 4, 8)
MAX_BATCHES = (64, 128, 256)
JOINT_BATCHES = (32, 64, 128, 256, 512)
OFFLINE_CALLERS = 2
WINDOWS = 4
QUIET_CPUS = 0.15
_ATTEMPTS = 4
WIDTH = 784
_MAX_QUEUE = 4096


MakeClients = Callable[[], list[Client]]


@dataclass(frozen=True)
class Case:
    """Something that answers.

    Attributes:
        kind: `naive`, the same for one task alone as `naive-one-task`, `joint` or `scheduler`.
        precision: of its graphs.
        batch: rows of a call; for the scheduler max_batch.
        clients: threads that ask.
    """

    kind: str
    precision: str
    batch: int
    clients: int


@dataclass(frozen=True)
class Measured:
    """One case in one repetition.

    Attributes:
        attempts: how often it ran until nothing else took the CPUs; the run kept is the least disturbed.
    """

    case: Case
    repetition: int
    rate: Rate
    attempts: int

    @property
    def is_disturbed(self) -> bool:
        """Whether something else took CPUs meanwhile even so."""
        return self.rate.other_cpus > QUIET_CPUS


class DirectClient:
    """Calls the session of the task that each request is for, one row at a time."""

    def __init__(self, sessions: Mapping[str, onnxruntime.InferenceSession], stream: Stream) -> None:
        self._sessions = sessions
        self._requests = iter(stream)

    def run(self, until_ns: int) -> int:
        """As Client.run."""
        sessions, requests = self._sessions, self._requests
        answers = 0
        while time.perf_counter_ns() < until_ns:
            row, task = next(requests)
            sessions[task].run(None, {"x": row})
            answers += 1
        return answers

    def finish(self) -> None:
        """As Client.finish: nothing is outstanding."""


class OfflineClient:
    """Calls the joint graph with the same full batch again and again."""

    def __init__(self, model: te_runtime.Model, rows: NDArray[np.float32]) -> None:
        self._model = model
        self._rows = rows

    def run(self, until_ns: int) -> int:
        """As Client.run."""
        answers = 0
        while time.perf_counter_ns() < until_ns:
            self._model.predict(self._rows)
            answers += len(self._rows)
        return answers

    def finish(self) -> None:
        """As Client.finish: nothing is outstanding."""


def measure_throughput(
    folder: Path, *, repetitions: int, seconds: float, progress: Callable[[str], None]
) -> list[Measured]:
    """Every case in every repetition, in an order drawn anew for each.

    Args:
        folder: what scheduler_subjects.py wrote.
        seconds: for each case.
    """
    rng = random.Random(0)
    found = []
    with contextlib.ExitStack() as stack:
        cases = _open(folder, stack)
        for repetition in range(repetitions):
            progress(f"throughput, repetition {repetition + 1} of {repetitions}")
            for case in rng.sample(list(cases), len(cases)):
                found.append(_measure_quietly(case, repetition, cases[case], seconds))
    return found


def _measure_quietly(case: Case, repetition: int, make: MakeClients, seconds: float) -> Measured:
    """Run a case again while something else takes the CPUs. What decides is that alone, never the rate found."""
    rates: list[Rate] = []
    while len(rates) < _ATTEMPTS:
        rates.append(drive(make(), seconds=seconds))
        if not rates[-1].other_cpus > QUIET_CPUS:
            break
    return Measured(case, repetition, min(rates, key=lambda rate: rate.other_cpus), len(rates))


def best(found: Sequence[Measured], kind: str, precision: str, *, batch: int | None = None) -> list[Measured]:
    """The case of a kind with the highest median rate, in order of repetition."""
    cases: dict[Case, list[Measured]] = {}
    for one in found:
        if (one.case.kind, one.case.precision) == (kind, precision) and batch in (None, one.case.batch):
            cases.setdefault(one.case, []).append(one)
    chosen = max(cases.values(), key=lambda own: float(np.median([one.rate.per_s for one in own])))
    return sorted(chosen, key=lambda one: one.repetition)


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[Case, MakeClients]:
    """What makes the clients of each case; `stack` closes what they call."""
    cases: dict[Case, MakeClients] = {}
    sessions = {
        path.stem.removeprefix("naive-"): _session(path) for path in sorted(folder.glob("naive-*.onnx"))
    }
    tasks = tuple(sessions)
    for count in CLIENTS:
        cases[Case("naive", "fp32", 1, count)] = partial(_direct, sessions, tasks, count)
        cases[Case("naive-one-task", "fp32", 1, count)] = partial(_direct, sessions, tasks[:1], count)
    for precision in PRECISIONS:
        load = partial(te_runtime.load, folder / "bundle", precision=precision, threads=1)
        joint = stack.enter_context(load(mode="joint"))
        for batch in JOINT_BATCHES:
            cases[Case("joint", precision, batch, OFFLINE_CALLERS)] = partial(_offline, joint, batch)
        split = stack.enter_context(load())
        for batch in MAX_BATCHES:
            scheduler = stack.enter_context(
                te_runtime.Scheduler(split, max_batch=batch, max_queue=_MAX_QUEUE)
            )
            for count in CLIENTS:
                cases[Case("scheduler", precision, batch, count)] = partial(
                    _windows, scheduler, WINDOWS * batch // count, count
                )
    return cases


def _direct(
    sessions: Mapping[str, onnxruntime.InferenceSession], tasks: Sequence[str], count: int
) -> list[Client]:
    return [DirectClient(sessions, Stream(tasks, width=WIDTH, seed=seed)) for seed in range(count)]


def _offline(model: te_runtime.Model, batch: int) -> list[Client]:
    rows = np.random.default_rng(0).standard_normal((batch, WIDTH), dtype=np.float32)
    return [OfflineClient(model, rows) for _ in range(OFFLINE_CALLERS)]


def _windows(scheduler: te_runtime.Scheduler, window: int, count: int) -> list[Client]:
    streams = [Stream(scheduler.tasks, width=WIDTH, seed=seed) for seed in range(count)]
    return [WindowClient(scheduler.submit, stream, window=window) for stream in streams]


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

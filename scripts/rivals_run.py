"""Runs a plan: makes each model's graphs, opens everybody, checks everybody's answers, times whoever is left.

A rival that is missing, fails or answers wrongly is named and left out, and so is te-export in int8. naive, te-export in
float32 and the roof are not: without them the figures say nothing, so that whatever is wrong with them ends the run.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from rivals_graphs import Graphs, make_graphs
from rivals_models import Model, build_model
from rivals_opening import Call, MissingRivalError, Opened, Setting
from rivals_parity import WrongAnswersError, check_answers
from rivals_plan import Block, Plan, Point, Scope, device_label
from rivals_results import Absence, Measured, Results
from rivals_subjects import Role, Subject, subjects_on
from rivals_timing import TimingOptions, time_in_rounds
from rivals_torch import forget_compiled

PAUSE_SECONDS = 0.05
"""Threads that wait for more work turn in circles: measured were up to 40 ms in ONNX Runtime and 10 ms in OpenMP."""

Tell = Callable[[str], None]
OpenAll = list[tuple[Subject, Opened]]


@dataclass(frozen=True)
class Ready:
    """A subject's call at a point, whose answers were found right."""

    subject: Subject
    call: Call
    error: float | None


def run_plan(plan: Plan, results: Results, tell: Tell) -> None:
    """Everything in the plan, into `results` as it comes, so that an interrupted run keeps what it has."""
    has_cuda = any(block.device == "cuda" for block in plan.blocks)
    for choice, blocks in groupby(plan.blocks, key=lambda block: block.model):
        tell(f"{choice.label}: making the model and its graphs")
        model = build_model(choice)
        with tempfile.TemporaryDirectory() as folder:
            graphs = make_graphs(model, Path(folder), has_cuda=has_cuda)
            results.models[choice.label] = f"{model.note}; int8: {graphs.int8}"
            for block in blocks:
                _run_block(block, plan, Bench(model, graphs, results, tell))


@dataclass(frozen=True)
class Bench:
    """What all blocks of a model share."""

    model: Model
    graphs: Graphs
    results: Results
    tell: Tell

    def leave_out(self, subject: Subject, where: str, reason: str) -> None:
        """Named, and told at once."""
        self.results.absences.append(Absence(subject.label, where, reason))
        self.tell(f"left out: {subject.label} ({where}): {reason}")


def _run_block(block: Block, plan: Plan, bench: Bench) -> None:
    torch.set_num_threads(block.threads)
    forget_compiled()
    opened = _open_all(block, subjects_on(block.device), bench)
    for point in block.points:
        ready = _check_all(point, opened, bench)
        options = TimingOptions(
            seconds=plan.seconds_of(block),
            least_rounds=plan.least_rounds,
            pause_seconds=PAUSE_SECONDS if block.threads > 1 else 0.0,
        )
        samples = time_in_rounds({one.subject: one.call for one in ready}, options)
        bench.results.measured += [_measured(point, one, samples[one.subject]) for one in ready]
        done = len(bench.results.points())
        rounds = len(next(iter(samples.values())))
        bench.tell(
            f"{point.label}: {len(ready)} subjects, {rounds} rounds (point {done} of {plan.point_count})"
        )


def _open_all(block: Block, subjects: Sequence[Subject], bench: Bench) -> OpenAll:
    where = f"{block.model.label}, {device_label(block.device, block.threads)}"
    opened: OpenAll = []
    for subject in subjects:
        reason = subject.left_out(block.model)
        if reason is not None:
            bench.leave_out(subject, where, reason)
            continue
        setting = Setting(bench.model, bench.graphs, subject.scope, block.device, block.threads)
        try:
            opened.append((subject, subject.open(setting)))
        except Exception as error:  # noqa: BLE001 - whatever a rival raises is told to the reader
            _tell_failure(subject, where, error, bench)
    return opened


def _check_all(point: Point, opened: OpenAll, bench: Bench) -> list[Ready]:
    """Those whose answers at a point are right."""
    x = bench.model.batch(point.batch)
    ready = []
    for subject, one in opened:
        try:
            call = one.call_for(x)
            ready.append(Ready(subject, call, _error_of(subject, call, point, bench.model)))
        except Exception as error:  # noqa: BLE001 - whatever a rival raises is told to the reader
            _tell_failure(subject, point.label, error, bench)
    return ready


def _error_of(subject: Subject, call: Call, point: Point, model: Model) -> float | None:
    found = call()
    if subject.role is Role.ROOF:
        return None  # checked as it was opened: it answers nothing
    answers, deviations = model.answers(point.batch), model.deviations
    count = 1 if subject.scope is Scope.ONE_TASK else model.choice.tasks
    return check_answers(found, answers[:count], deviations[:count], subject.precision)


def _tell_failure(subject: Subject, where: str, error: Exception, bench: Bench) -> None:
    """Name a rival that cannot be timed; what the benchmark cannot do without ends it instead.

    Raises:
        Exception: the error itself, of naive, te-export in float32 or the roof.
    """
    is_explained = isinstance(error, MissingRivalError | WrongAnswersError)
    if subject.is_needed:
        raise error
    bench.leave_out(subject, where, str(error) if is_explained else _one_line(error))


def _one_line(error: Exception) -> str:
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _measured(point: Point, ready: Ready, rounds_us: Iterable[list[float]]) -> Measured:
    subject = ready.subject
    return Measured(
        point=point,
        subject=subject.name,
        scope=subject.scope,
        role=subject.role,
        precision=subject.precision,
        error=ready.error,
        rounds_us=list(rounds_us),
    )

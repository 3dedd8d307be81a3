"""A world for the scheduler without threads: a heap of events, a clock that jumps from one to the next, and executors
that only take time, fail or hang. It drives the real Dispatcher as scheduler.py does, and holds every decision
against rules that it works out for itself.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from te_runtime.errors import ClosedError, DeadlineError, QueueFullError
from te_runtime.scheduling.batch import Batch
from te_runtime.scheduling.dispatcher import Assignment, Dispatcher, Limits, Outcome
from te_runtime.scheduling.latency_model import LatencyModel
from te_runtime.scheduling.request import Request
from te_runtime.scheduling.resource_pool import Resource, ResourcePool
from te_runtime.scheduling.warm_up import batch_knots

MS = 1_000_000
US = 1_000
S = 1_000_000_000
TASKS = ("a", "b", "c", "d", "e")

REFUSALS = (QueueFullError, DeadlineError, ClosedError)

Trouble = Literal["none", "fails", "late", "hangs"]


class FakeError(Exception):
    """What a fake executor raises."""


def no_trouble(batch: Batch, now_ns: int) -> Trouble:
    """An executor that always answers."""
    return "none"


@dataclass(eq=False)
class FakeExecutor:
    """An executor whose batches take `fixed + rows · row + tasks · tail`, times noise and slowdown.

    Attributes:
        noise: deviation of the latency's logarithm.
        slowdown: a factor, from the time at which a batch begins.
        trouble: what becomes of a batch.
        late_ns: how much longer a batch that is late takes.
    """

    name: str
    fixed_ns: float = 200_000
    row_ns: float = 10_000
    tail_ns: float = 20_000
    noise: float = 0.0
    slowdown: Callable[[int], float] = lambda now_ns: 1.0
    trouble: Callable[[Batch, int], Trouble] = no_trouble
    late_ns: int = 3 * S

    def exact_ns(self, tasks: int, rows: int) -> float:
        """What a batch takes without noise."""
        return self.fixed_ns + rows * self.row_ns + tasks * self.tail_ns

    def latency_ns(self, batch: Batch, now_ns: int, rng: Random) -> int:
        """What a batch takes."""
        exact = self.exact_ns(len(batch.tasks), batch.rows) * self.slowdown(now_ns)
        return max(1, round(exact * math.exp(rng.gauss(0.0, self.noise)) if self.noise else exact))

    def resource(self, max_batch: int, tasks: Sequence[str] = TASKS) -> Resource:
        """What warming up would have made of it."""
        trunk = {rows: self.fixed_ns + rows * self.row_ns for rows in batch_knots(max_batch)}
        return Resource(self.name, LatencyModel(trunk, dict.fromkeys(tasks, self.tail_ns)))


@dataclass
class Run:
    """A batch that began."""

    resource: str
    requests: tuple[Request, ...]
    rows: int
    begun_ns: int
    was_second_try: bool


@dataclass
class Tally:
    """What became of requests, and when."""

    accepted: list[Request] = field(default_factory=list)
    refused: list[tuple[int, Exception]] = field(default_factory=list)
    ended: dict[Request, tuple[Outcome, int]] = field(default_factory=dict)
    errors: dict[Request, BaseException] = field(default_factory=dict)
    begun: dict[Request, list[int]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    def last_ns(self) -> int:
        """When the last request ended."""
        return max(when for _, when in self.ended.values())

    def count(self, outcome: Outcome) -> int:
        """How many requests ended so."""
        return sum(found == outcome for found, _ in self.ended.values())


def limits(
    *,
    max_batch: int = 64,
    max_delay_ms: float = 1.0,
    max_queue: int = 1024,
    patience_ms: float = 1000.0,
    stall_ms: float = 1000.0,
) -> Limits:
    """Limits as a caller would give them."""
    return Limits(
        max_batch, round(max_delay_ms * MS), max_queue, round(patience_ms * MS), round(stall_ms * MS)
    )


class Simulation:
    """Requests come, time passes, and every rule that must always hold is checked as it does.

    Args:
        tick_lag_ns: how late a moment that was asked for is told, at most.
        is_strict: look at everything that waits after each event, not only at what begins.
    """

    def __init__(
        self,
        executors: Sequence[FakeExecutor],
        bounds: Limits | None = None,
        *,
        seed: int = 0,
        tick_lag_ns: int = 0,
        is_strict: bool = False,
    ) -> None:
        self.bounds = limits() if bounds is None else bounds
        self.rng = Random(seed)
        self.now_ns = 0
        self.tally = Tally()
        self.executors = {executor.name: executor for executor in executors}
        resources = [executor.resource(self.bounds.max_batch) for executor in executors]
        self.dispatcher = Dispatcher(ResourcePool(resources), self.bounds)
        self.waiting: set[Request] = set()
        self.poisoned: set[Request] = set()
        self._unfinished: set[Request] = set()
        self._events: list[tuple[int, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._sequence = itertools.count()
        self._occupied: dict[str, Batch] = {}
        self._planned_ns: int | None = None
        self._tick_lag_ns = tick_lag_ns
        self._is_strict = is_strict

    # What tests ask for.

    def at(self, when_ns: int, action: Callable[[], object]) -> None:
        """Have something happen."""
        heapq.heappush(self._events, (when_ns, next(self._order), action))

    def submit(
        self,
        *,
        rows: int = 1,
        tasks: tuple[str, ...] = ("a",),
        priority: float = 0.0,
        deadline_ms: float | None = None,
        row_shapes: tuple[tuple[int, ...], ...] = ((4,),),
        is_poisoned: bool = False,
    ) -> Request | None:
        """A caller asks now; None where that is refused."""
        request = Request(
            data=(b"",),
            row_shapes=row_shapes,
            rows=rows,
            tasks=tasks,
            is_single=len(tasks) == 1,
            priority=priority,
            deadline_ns=None if deadline_ms is None else self.now_ns + round(deadline_ms * MS),
            submitted_ns=self.now_ns,
            sequence=next(self._sequence),
        )
        request.future.request, request.future.withdraw = request, self.dispatcher.cancel
        try:
            self.dispatcher.submit(request, self.now_ns)
        except REFUSALS as error:
            self.tally.refused.append((self.now_ns, error))
            return None
        self.tally.accepted.append(request)
        self.waiting.add(request)
        self._unfinished.add(request)
        if is_poisoned:
            self.poisoned.add(request)
        if self.dispatcher.pool.has_idle:
            self._begin(self.dispatcher.dispatch(self.now_ns))
        return request

    def cancel(self, request: Request) -> None:
        """The caller takes a request back, if it still can."""
        can = request in self.waiting or request.future.cancelled()
        assert request.future.cancel() == can

    def close(self, *, drain: bool) -> None:
        """Let nothing more in; what waits is run or dropped."""
        self.dispatcher.is_closed = True
        if not drain:
            self.dispatcher.drop_waiting(lambda: ClosedError("closed"))

    def run(self, until_ns: int | None = None) -> Tally:
        """Let time pass until nothing is left to happen."""
        while self._events and (until_ns is None or self._events[0][0] <= until_ns):
            when_ns, _, action = heapq.heappop(self._events)
            assert when_ns >= self.now_ns
            self.now_ns = when_ns
            action()
            self._settle()
        if until_ns is not None:
            self.now_ns = max(self.now_ns, until_ns)
        return self.tally

    def assert_nothing_left(self) -> None:
        """Every accepted request has ended, and the dispatcher remembers none of them."""
        dispatcher, queue = self.dispatcher, self.dispatcher.queue
        assert dispatcher.is_quiet
        assert dispatcher.running == 0
        assert not self.waiting
        assert set(self.tally.ended) == set(self.tally.accepted)
        assert all(request.future.done() for request in self.tally.accepted)
        assert (len(queue), queue.rows, queue.distinct_tasks) == (0, 0, 0)
        assert dispatcher.next_tick_ns() is None
        assert not queue._deadlines
        assert not dispatcher._retries
        assert not dispatcher._retrying
        assert not dispatcher.endings
        assert all(resource.state != "suspect" for resource in dispatcher.pool.resources)

    # What happens.

    def _begin(self, assignments: Sequence[Assignment]) -> None:
        for assignment in assignments:
            resource, batch = assignment
            self._check_batch(resource, batch)
            self._occupied[resource.name] = batch
            again = any(request in self.tally.begun for request in batch.requests)
            self.tally.runs.append(Run(resource.name, tuple(batch.requests), batch.rows, self.now_ns, again))
            for request in batch.requests:
                self.waiting.discard(request)
                self.tally.begun.setdefault(request, []).append(self.now_ns)
            self._run(assignment)

    def _run(self, assignment: Assignment) -> None:
        resource, batch = assignment
        executor = self.executors[resource.name]
        trouble = executor.trouble(batch, self.now_ns)
        if trouble == "hangs":
            return
        latency = executor.latency_ns(batch, self.now_ns, self.rng)
        if trouble == "late":
            latency += executor.late_ns
        fails = trouble == "fails" or not self.poisoned.isdisjoint(batch.requests)
        self.at(self.now_ns + latency, lambda: self._done(assignment, fails=fails))

    def _done(self, assignment: Assignment, *, fails: bool) -> None:
        resource, batch = assignment
        assert self._occupied.pop(resource.name) is batch
        if fails:
            self.dispatcher.failed(assignment, FakeError(resource.name), self.now_ns)
        elif self.dispatcher.completed(assignment, self.now_ns):
            for request in batch.requests:
                in_time = request.deadline_ns is None or self.now_ns <= request.deadline_ns
                self._end(request, "in_time" if in_time else "late")
                request.future.set_result(resource.name)
        self._begin(self.dispatcher.dispatch(self.now_ns))

    def _ring(self) -> None:
        if self._planned_ns is None or self._planned_ns > self.now_ns:
            return  # an earlier ring took its place
        self._planned_ns = None
        self._begin(self.dispatcher.tick(self.now_ns))
        moment = self.dispatcher.next_tick_ns()
        assert moment is None or moment > self.now_ns, "what was due at this tick is not done"

    def _settle(self) -> None:
        endings, self.dispatcher.endings = self.dispatcher.endings, []
        for request, outcome, error in endings:
            self.waiting.discard(request)
            self._end(request, outcome)
            if error is None:
                assert request.future.cancelled()
            else:
                self.tally.errors[request] = error
                request.future.set_exception(error)
        moment = self.dispatcher.next_tick_ns()
        if moment is not None and (self._planned_ns is None or moment < self._planned_ns):
            lag = self.rng.randint(0, self._tick_lag_ns) if self._tick_lag_ns else 0
            self._planned_ns = max(self.now_ns, moment)
            self.at(self._planned_ns + lag, self._ring)
        is_settled = not self._events or self._events[0][0] > self.now_ns
        if self._is_strict and is_settled and not self._tick_lag_ns:
            self._check_moment()

    def _end(self, request: Request, outcome: Outcome) -> None:
        assert request not in self.tally.ended, "a request ended twice"
        self.tally.ended[request] = (outcome, self.now_ns)
        self._unfinished.discard(request)

    # What must always hold.

    def _check_batch(self, resource: Resource, batch: Batch) -> None:
        assert resource.name not in self._occupied, "an executor got a second batch"
        assert resource.state in ("live", "suspect")
        assert batch.requests
        assert batch.rows == sum(request.rows for request in batch.requests) <= self.bounds.max_batch
        assert len({request.row_shapes for request in batch.requests}) == 1
        assert batch.tasks == {task for request in batch.requests for task in request.tasks}
        for request in batch.requests:
            assert request.future.running()
            assert request not in self.tally.ended, "an ended request is run"
            assert request.deadline_ns is None or self.now_ns < request.deadline_ns, "run after its deadline"
            assert len(self.tally.begun.get(request, ())) < 2, "tried more than twice"
        second = [request in self.tally.begun for request in batch.requests]
        assert not any(second) or len(batch.requests) == 1, "a second try is alone"

    def _check_moment(self) -> None:
        """After everything that happens at this moment: nothing is overdue."""
        dispatcher, now_ns = self.dispatcher, self.now_ns
        assert len(self.waiting) == len(dispatcher.queue) <= self.bounds.max_queue
        assert set(dispatcher.queue) == self.waiting
        assert list(dispatcher.queue) == self.in_order(self.waiting)
        assert dispatcher.queue.rows == sum(request.rows for request in self.waiting)
        batches = [batch for batch in self._occupied.values() if not batch.was_given_up]
        running = {request for batch in batches for request in batch.requests}
        for request in self._unfinished:
            is_overdue = request.deadline_ns is not None and request.deadline_ns <= now_ns
            assert not is_overdue or request in running, "expired, and nobody was told"
        for batch in batches:
            assert now_ns < batch.started_ns + self.bounds.stall_ns, "hangs, and was not given up"
        assert any(resource.state != "out" for resource in dispatcher.pool.resources), "nobody is left to run"
        if dispatcher.pool.has_idle and self.waiting:
            oldest = min(request.submitted_ns for request in self.waiting)
            moment = dispatcher.next_tick_ns()
            assert moment is not None, "an executor is idle, requests wait, and nothing will wake them"
            if len(self.executors) == 1:
                assert now_ns < oldest + self.bounds.max_delay_ns, "held for too long"

    def in_order(self, requests: set[Request]) -> list[Request]:
        """By the score of the specification at this moment, highest first; then first come."""
        states = [resource.state for resource in self.dispatcher.pool.resources]
        capacity = len(states) - states.count("out")
        return sorted(requests, key=lambda one: (-self.score(one, capacity), one.sequence))

    def score(self, request: Request, capacity: int) -> float:
        """p - d / Σ r, in points and milliseconds, rounded so that equal ones are equal."""
        until = request.deadline_ns
        if until is None:
            until = request.submitted_ns + self.bounds.patience_ns
        return round(request.priority - (until - self.now_ns) / MS / capacity, 9)


def poisson_ns(rng: Random, per_s: float, duration_ns: int) -> list[int]:
    """When requests come that know nothing of each other."""
    found, now = [], 0.0
    while (now := now + rng.expovariate(per_s) * S) < duration_ns:
        found.append(int(now))
    return found

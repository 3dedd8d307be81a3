"""The scheduler without threads: every event comes in with the time it happened at, and decisions come out.

    submit · cancel · tick · completed · failed      →      batches to hand to executors, requests that ended

One lock of the caller's guards it all. It never calls out: what ended is collected in `endings`, for the caller to
pass on once the lock is released, since a future's callbacks may come back here. The simulation in the tests drives
this class with a clock of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from te_runtime.errors import ClosedError, DeadlineError, QueueFullError, StallError
from te_runtime.scheduling.batch import Batch
from te_runtime.scheduling.batcher import ArrivalGap, Batcher
from te_runtime.scheduling.controller import Controller
from te_runtime.scheduling.request import Request, rank_ns
from te_runtime.scheduling.request_queue import RequestQueue
from te_runtime.scheduling.resource_pool import Resource, ResourcePool, first_to_finish

__all__ = ["Assignment", "Dispatcher", "Ending", "Limits", "Outcome"]

Outcome = Literal["in_time", "late", "failed", "expired", "cancelled", "dropped"]

_NS_PER_MS = 1e6
_LEAST_SLACK_NS = 100_000


class Limits(NamedTuple):
    """What a scheduler was asked to keep to.

    Attributes:
        max_batch: rows that run together.
        max_delay_ns: the longest that a batch is held back to grow.
        max_queue: requests that may wait.
        patience_ns: what a request without a deadline is ranked by.
        stall_ns: a batch that takes longer is given up.
    """

    max_batch: int
    max_delay_ns: int
    max_queue: int
    patience_ns: int
    stall_ns: int


class Ending(NamedTuple):
    """How a request ended without an answer.

    Attributes:
        error: for its future; None where the caller has cancelled it.
    """

    request: Request
    outcome: Outcome
    error: BaseException | None


class Assignment(NamedTuple):
    """A batch for an executor that is idle: run it now."""

    resource: Resource
    batch: Batch


@dataclass(slots=True, eq=False)
class _Trial:
    """Whether an executor failed, or a request did: its requests are run again, each alone, elsewhere.

    Attributes:
        suspect: the executor they failed on.
        size: how many there are.
        left: how many are not done with.
        succeeded: how many did on another executor.
    """

    suspect: Resource
    size: int
    left: int
    succeeded: int = 0


@dataclass(slots=True, eq=False)
class _Retry:
    request: Request
    trial: _Trial


@dataclass(slots=True)
class Dispatcher:
    """Queue, batcher, resource pool and controller at work together.

    Attributes:
        pool: the executors.
        limits: what to keep to.
        endings: requests that ended without an answer, until the caller takes them.
        is_closed: nothing is let in any more.
    """

    pool: ResourcePool
    limits: Limits
    endings: list[Ending] = field(default_factory=list)
    is_closed: bool = False
    queue: RequestQueue = field(init=False)
    controller: Controller = field(init=False)
    _batcher: Batcher = field(init=False)
    _gap: ArrivalGap = field(default_factory=ArrivalGap)
    _hold_until_ns: int | None = None
    _look_again_ns: int | None = None
    _drops: bool = False
    _retries: deque[_Retry] = field(default_factory=deque)
    _retrying: dict[Batch, _Retry] = field(default_factory=dict)
    _capacity: float = 0.0

    def __post_init__(self) -> None:
        limits = self.limits
        self.queue = RequestQueue(limits.max_queue)
        self.controller = Controller(self.queue, self.pool, max_batch=limits.max_batch)
        self._batcher = Batcher(max_batch=limits.max_batch, max_delay_ns=limits.max_delay_ns)
        self._capacity = self.pool.capacity

    def submit(self, request: Request, now_ns: int) -> None:
        """Let a request in.

        Raises:
            ClosedError: the scheduler is closing.
            QueueFullError: as many as may wait do.
            DeadlineError: it would not be answered in time.
        """
        if self.is_closed:
            raise ClosedError("the scheduler was closed: make another one")
        if self.queue.is_full:
            raise QueueFullError(self.queue.capacity)
        request.rank_ns = rank_ns(request, capacity=self._capacity, patience_ns=self.limits.patience_ns)
        if request.deadline_ns is not None:
            finish = self.controller.predict_finish_ns(request, now_ns)
            if finish > request.deadline_ns:
                self.controller.relax_if_idle()
                raise DeadlineError(
                    allowed_ms=(request.deadline_ns - request.submitted_ns) / _NS_PER_MS,
                    predicted_ms=(finish - request.submitted_ns) / _NS_PER_MS,
                )
        self._gap.arrived(now_ns)
        self.queue.push(request)

    def cancel(self, request: Request) -> bool:
        """Take a request out that its caller has cancelled; True where it was still waiting."""
        removed = self.queue.remove(request)
        if removed:
            request.future.set_running_or_notify_cancel()  # or concurrent.futures.wait would wait on
            self.endings.append(Ending(request, "cancelled", None))
        return removed

    def dispatch(self, now_ns: int) -> list[Assignment]:
        """Everything that should begin now, most urgent first. The caller hands it to the executors."""
        self._hold_until_ns = self._look_again_ns = None
        found = self._dispatch_retries(now_ns) if self._retries else []
        if not self.queue or not self.pool.has_idle:
            return found
        self._expire(now_ns)
        queue, live = self.queue, self.pool.live
        offset = 0
        free_at = [resource.free_from_ns(now_ns) for resource in live]
        while offset < len(queue) and self.pool.has_idle:
            rows = min(queue.rows, self.limits.max_batch)
            place, finish = first_to_finish(live, free_at, min(queue.distinct_tasks, rows), rows)
            resource = live[place]
            if offset == 0 and resource.is_idle and self._holds(resource, now_ns):
                break
            cut = self._batcher.cut(queue.from_place(offset), resource.latency, now_ns)
            if not resource.is_idle:  # though busy it is done first, so these wait for it
                offset += cut.size
                free_at[place] = round(finish)
                self._look_again(resource, now_ns)
                continue
            taken = queue.take(offset, cut.size)
            requests = self._begun(taken)
            if requests:
                shape = (cut.tasks, cut.rows) if len(requests) == len(taken) else _shape(requests)
                found.append(self._assign(resource, requests, shape, now_ns))
                free_at[place] = resource.free_at_ns
        return found

    def completed(self, assignment: Assignment, now_ns: int) -> bool:
        """An executor has answered its batch. False where that was given up and the answers are to be ignored."""
        resource, batch = assignment
        if not self._freed(resource, batch, now_ns):
            return False
        resource.batches += 1
        self.controller.learn(resource, batch, now_ns - batch.started_ns)
        self._tried_again(batch, resource, succeeded=True)
        return True

    def failed(self, assignment: Assignment, error: BaseException, now_ns: int) -> None:
        """An executor could not run its batch: every request in it is tried once more, alone."""
        resource, batch = assignment
        if self._freed(resource, batch, now_ns):
            self._try_again(resource, batch, error)

    def tick(self, now_ns: int) -> list[Assignment]:
        """What time alone brings about: deadlines pass, a batch was held long enough, an executor is stuck."""
        self._expire(now_ns)
        for resource in self.pool.resources:
            batch = resource.batch
            if (
                batch is not None
                and not batch.was_given_up
                and now_ns >= batch.started_ns + self.limits.stall_ns
            ):
                batch.was_given_up = True
                error = StallError(resource.name, self.limits.stall_ns / 1e9)
                self.pool.change_state(resource, "stuck", error)
                self._try_again(resource, batch, error)
        return self.dispatch(now_ns)

    def next_tick_ns(self) -> int | None:
        """When tick should be called if nothing happens before."""
        moments = [self._hold_until_ns, self._look_again_ns, self.queue.next_deadline_ns()]
        for resource in self.pool.resources:
            batch = resource.batch
            if batch is not None and not batch.was_given_up:
                moments.append(batch.started_ns + self.limits.stall_ns)
        for retry in self._retries:
            moments.append(retry.request.deadline_ns)
        return min([moment for moment in moments if moment is not None], default=None)

    def drop_waiting(self, error: Callable[[], BaseException]) -> None:
        """End everything that does not run; what runs is not tried again."""
        self.is_closed = self._drops = True
        waiting = self._begun(self.queue.take(0, len(self.queue)))
        while self._retries:
            retry = self._retries.popleft()
            waiting.append(retry.request)
            self._count(retry.trial)
        self.endings += [Ending(request, "dropped", error()) for request in waiting]

    @property
    def running(self) -> int:
        """How many requests run, or wait to be tried again."""
        batches = [resource.batch for resource in self.pool.resources]
        runs = sum(len(batch.requests) for batch in batches if batch is not None and not batch.was_given_up)
        return runs + len(self._retries)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing waits and nothing runs that is still of use."""
        batches = [resource.batch for resource in self.pool.resources]
        runs = any(batch is not None and not batch.was_given_up for batch in batches)
        return not (self.queue or self._retries or runs)

    def _holds(self, resource: Resource, now_ns: int) -> bool:
        self._hold_until_ns = self._batcher.hold_until_ns(self.queue, resource.latency, self._gap, now_ns)
        return self._hold_until_ns is not None

    def _look_again(self, resource: Resource, now_ns: int) -> None:
        """Have it decided anew whether to wait for a busy executor, should that take much longer than foreseen."""
        assert resource.batch is not None
        slack = max(_LEAST_SLACK_NS, round(resource.batch.expected_ns))
        moment = resource.free_from_ns(now_ns) + slack
        if self._look_again_ns is None or moment < self._look_again_ns:
            self._look_again_ns = moment

    def _assign(
        self,
        resource: Resource,
        requests: list[Request],
        shape: tuple[frozenset[str], int],
        now_ns: int,
    ) -> Assignment:
        tasks, rows = shape
        expected = resource.latency.expect(tasks, rows)
        batch = Batch(requests, tasks, rows, now_ns, expected)
        self.pool.begin(resource, batch)
        return Assignment(resource, batch)

    def _begun(self, requests: list[Request]) -> list[Request]:
        """Those that their callers have not cancelled; from here on they cannot be."""
        begun = []
        for request in requests:
            if request.future.set_running_or_notify_cancel():
                begun.append(request)
            else:
                self.endings.append(Ending(request, "cancelled", None))
        return begun

    def _expire(self, now_ns: int) -> None:
        deadline_ns = self.queue.next_deadline_ns()
        if deadline_ns is None or deadline_ns > now_ns:
            return
        for request in self._begun(self.queue.take_expired(now_ns)):
            self.endings.append(Ending(request, "expired", _expired(request, now_ns)))

    def _freed(self, resource: Resource, batch: Batch, now_ns: int) -> bool:
        """The executor has come back from `batch`; False where that was given up meanwhile."""
        self.pool.end(resource, batch, now_ns)
        if batch.was_given_up:
            self.pool.change_state(resource, "live")
        return not batch.was_given_up

    def _try_again(self, resource: Resource, batch: Batch, error: BaseException) -> None:
        """Plan the second try of what failed on `resource`, or end it where that was the second."""
        if batch in self._retrying:
            for request in batch.requests:
                if error.__cause__ is None and error is not request.first_error:
                    error.__cause__ = request.first_error
                self.endings.append(Ending(request, "failed", error))
            self._tried_again(batch, resource, succeeded=False)
            return
        if self._drops or not self.pool.elsewhere(resource):
            self.endings += [Ending(request, "failed", error) for request in batch.requests]
            return
        if resource.state == "live" and self.pool.has_other(resource):
            self.pool.change_state(resource, "suspect", error)
        trial = _Trial(resource, size=len(batch.requests), left=len(batch.requests))
        for request in batch.requests:
            request.first_error = error
            self._retries.append(_Retry(request, trial))

    def _dispatch_retries(self, now_ns: int) -> list[Assignment]:
        found: list[Assignment] = []
        waiting: deque[_Retry] = deque()
        while self._retries:
            retry = self._retries.popleft()
            request, suspect = retry.request, retry.trial.suspect
            able = self.pool.elsewhere(suspect)
            resource = next((one for one in able if one.batch is None), None)
            if request.deadline_ns is not None and request.deadline_ns <= now_ns:
                self.endings.append(Ending(request, "expired", _expired(request, now_ns)))
                self._count(retry.trial)
            elif not able:
                self.endings.append(Ending(request, "failed", request.first_error))
                self._count(retry.trial)
            elif resource is None:
                waiting.append(retry)
            else:
                assignment = self._assign(resource, [request], _shape([request]), now_ns)
                self._retrying[assignment.batch] = retry
                found.append(assignment)
        self._retries = waiting
        return found

    def _tried_again(self, batch: Batch, resource: Resource, *, succeeded: bool) -> None:
        retry = self._retrying.pop(batch, None)
        if retry is None:
            return
        if resource is not retry.trial.suspect:
            retry.trial.succeeded += succeeded
        self._count(retry.trial)

    def _count(self, trial: _Trial) -> None:
        """One request of a trial is done with; after the last the executor is judged.

        Where all of them succeeded elsewhere the executor was at fault and is taken out, unless none would be left.
        Where one failed there too, that request was at fault; where one ended untried, nobody knows.
        """
        trial.left -= 1
        suspect = trial.suspect
        if trial.left or suspect.state != "suspect":
            return
        if trial.succeeded == trial.size and self.pool.has_other(suspect):
            self.pool.change_state(suspect, "out", suspect.error)
            self._capacity = self.pool.capacity
            patience_ns = self.limits.patience_ns
            self.queue.rerank(lambda one: rank_ns(one, capacity=self._capacity, patience_ns=patience_ns))
        else:
            self.pool.change_state(suspect, "live")


def _shape(requests: list[Request]) -> tuple[frozenset[str], int]:
    """The tasks that requests ask for, and how many rows they have."""
    tasks = frozenset(task for request in requests for task in request.tasks)
    return tasks, sum(request.rows for request in requests)


def _expired(request: Request, now_ns: int) -> DeadlineError:
    assert request.deadline_ns is not None
    return DeadlineError(
        allowed_ms=(request.deadline_ns - request.submitted_ns) / _NS_PER_MS,
        waited_ms=(now_ns - request.submitted_ns) / _NS_PER_MS,
    )

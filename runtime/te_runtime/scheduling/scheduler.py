"""Scheduler: many callers, many tasks, and one trunk pass for as many of them as fit.

Threads: callers, one per executor, and a timekeeper. Whoever brings an event (a request, an answered batch, a moment
that has come) takes the one lock, lets the dispatcher decide, and hands the batches that should begin to their
executors' inboxes. Futures are completed with no lock held.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, SupportsIndex, overload

import numpy as np

from te_runtime.errors import ClosedError, DeadlineError, QueueFullError
from te_runtime.forking import watch_forks
from te_runtime.scheduling.batch import InputLayout, PackedRows, pack_rows, take_answers
from te_runtime.scheduling.dispatcher import Assignment, Dispatcher
from te_runtime.scheduling.metrics import ExecutorMetrics, MetricsRecorder, SchedulerMetrics
from te_runtime.scheduling.options import WhenFull, parse_scheduler_options
from te_runtime.scheduling.refusal_pace import RefusalPace
from te_runtime.scheduling.request import Request
from te_runtime.scheduling.request_future import answer_all, fail_all
from te_runtime.scheduling.request_reader import RequestReader, Rows
from te_runtime.scheduling.resource_pool import Resource, ResourcePool
from te_runtime.scheduling.runner import Runner, choose_runners
from te_runtime.scheduling.timekeeper import Timekeeper
from te_runtime.scheduling.warm_up import measure_executors
from te_runtime.scheduling.worker import Worker

if TYPE_CHECKING:
    from te_runtime.prediction import Prediction
    from te_runtime.predictor import Model

__all__ = ["Scheduler"]

_CLOSED = "the scheduler was closed: make another one"
_FORKED = (
    "the scheduler was made before this process was forked, and its threads do not survive that: load the model "
    "and make a scheduler after the fork"
)


class Scheduler:
    """Answers requests of many callers in batches; any thread may call it, and so may coroutines."""

    def __init__(
        self,
        model: Model | Sequence[Model],
        *,
        max_batch: int = 64,
        max_delay_ms: float = 1.0,
        max_queue: int = 1024,
        executors: int | None = None,
        when_full: WhenFull = "refuse",
        patience_ms: float = 1000.0,
        stall_timeout_s: float = 10.0,
    ) -> None:
        """Start the executors' threads and measure what batches take; for a small model some 100 ms.

        Args:
            model: what te_runtime.load gave, best with threads=1; or several models of one bundle, such as one on the
                CPU and one on CUDA. They stay the caller's: close them after the scheduler.
            max_batch: the most rows that run together.
            max_delay_ms: the longest that a batch is held back to grow while an executor is idle.
            max_queue: the most requests that wait.
            executors: threads that run batches side by side, for each model on the CPU; None for as many as
                the models' own threads leave CPUs for. A model on CUDA has one.
            when_full: submit to a full queue raises QueueFullError at once (`refuse`) or waits for a place (`block`).
            patience_ms: a request without a deadline is served as if it had one this long after its submission.
            stall_timeout_s: a batch that takes longer is given up, and its requests tried elsewhere.

        Raises:
            InputError: an argument is not what it must be, or the models do not fit together.
            ClosedError, BundleError: a model is closed, or cannot be run.
        """
        options = parse_scheduler_options(
            max_batch=max_batch,
            max_delay_ms=max_delay_ms,
            max_queue=max_queue,
            executors=executors,
            when_full=when_full,
            patience_ms=patience_ms,
            stall_timeout_s=stall_timeout_s,
        )
        models = tuple(model) if isinstance(model, Sequence) else (model,)
        runners = choose_runners(models, options.executors)
        least = min((one.max_batch for one in models if one.max_batch is not None), default=None)
        limits = options.limits
        if least is not None:
            limits = limits._replace(max_batch=min(least, limits.max_batch))
        self._model = models[0]
        self._tasks = models[0].tasks
        self._withdraw = self._cancel  # bound once, not for each request
        self._blocks = options.when_full == "block"
        self._clock_ns = time.perf_counter_ns
        self._gone: str | None = None
        self._pace = RefusalPace()
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._space: list[Callable[[], object]] = []
        self._metrics = MetricsRecorder(self._tasks)
        rows = models[0].example_rows()
        self._inputs = tuple(InputLayout(spec.name, rows[spec.name].dtype) for spec in models[0].inputs)
        self._reader = RequestReader(
            self._tasks,
            self._inputs,
            models[0].input_reader,
            max_batch=limits.max_batch,
            clock_ns=self._clock_ns,
        )
        resources = measure_executors(runners, rows, self._tasks, limits.max_batch)
        self._dispatcher = Dispatcher(ResourcePool(resources), limits)
        self._begun_ns = self._clock_ns()
        self._workers = {
            resource: Worker(runner, self._work, self._work_here)
            for resource, runner in zip(self._dispatcher.pool.resources, runners, strict=True)
        }
        self._timekeeper = Timekeeper(self._tick, self._clock_ns)
        watch_forks(self)
        self._unregister = _close_at_exit(self)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return self._tasks

    @overload
    def submit(
        self, x: Rows, *, task: str, priority: float = 0, deadline_ms: float | None = None
    ) -> Future[Prediction]: ...
    @overload
    def submit(
        self,
        x: Rows,
        *,
        tasks: Sequence[str] | None = None,
        priority: float = 0,
        deadline_ms: float | None = None,
    ) -> Future[dict[str, Prediction]]: ...
    def submit(
        self,
        x: Rows,
        *,
        task: str | None = None,
        tasks: Sequence[str] | None = None,
        priority: float = 0,
        deadline_ms: float | None = None,
    ) -> Future[Any]:
        """Ask for predictions; returns at once.

        Args:
            x: as for Model.predict, at most max_batch rows; it is copied.
            task: one task, whose Prediction the future gives; or
            tasks: several, or None for all, for which it gives a dict.
            priority: 0 to 100. A point is worth as many milliseconds of deadline as there are executors.
            deadline_ms: from now. What cannot be answered by then is refused, and what was let in and cannot be begun by
                then is not run.

        Returns:
            A future: result() waits, cancel() takes the request back while it waits, and
            add_done_callback tells. Besides what Model.predict raises it may give DeadlineError and ClosedError.

        Raises:
            InputError: as Model.predict; or more rows than max_batch.
            QueueFullError: max_queue requests wait, and when_full is `refuse`.
            DeadlineError: the answer would come too late; `predicted_ms` tells when.
            ClosedError: the scheduler was closed.
        """
        request = self._reader.read(x, task=task, tasks=tasks, priority=priority, deadline_ms=deadline_ms)
        while True:
            try:
                return self._submit(request)
            except (QueueFullError, DeadlineError) as refusal:
                if not (self._blocks and isinstance(refusal, QueueFullError)):
                    pause_s = self._refused(refusal)
                    if pause_s:
                        time.sleep(pause_s)
                    raise
            freed = threading.Event()
            self._when_space(freed.set)
            freed.wait()

    @overload
    async def infer(
        self, x: Rows, *, task: str, priority: float = 0, deadline_ms: float | None = None
    ) -> Prediction: ...
    @overload
    async def infer(
        self,
        x: Rows,
        *,
        tasks: Sequence[str] | None = None,
        priority: float = 0,
        deadline_ms: float | None = None,
    ) -> dict[str, Prediction]: ...
    async def infer(
        self,
        x: Rows,
        *,
        task: str | None = None,
        tasks: Sequence[str] | None = None,
        priority: float = 0,
        deadline_ms: float | None = None,
    ) -> Any:
        """As submit, for coroutines: waits for the answer, and for a place in the queue, without blocking the loop.

        Cancelling the awaiting task takes the request back while it waits.
        """
        request = self._reader.read(x, task=task, tasks=tasks, priority=priority, deadline_ms=deadline_ms)
        while True:
            try:
                future = self._submit(request)
            except (QueueFullError, DeadlineError) as refusal:
                if not (self._blocks and isinstance(refusal, QueueFullError)):
                    pause_s = self._refused(refusal)
                    if pause_s:
                        await asyncio.sleep(pause_s)
                    raise
            else:
                return await asyncio.wrap_future(future)
            loop = asyncio.get_running_loop()
            freed = asyncio.Event()
            self._when_space(functools.partial(_wake, loop, freed))
            await freed.wait()

    def metrics(self) -> SchedulerMetrics:
        """Everything since the scheduler began; a closed one still tells.

        Raises:
            ClosedError: the scheduler was made before this process was forked.
        """
        if self._gone is _FORKED:
            raise ClosedError(_FORKED)
        now_ns = self._clock_ns()
        with self._lock:
            dispatcher = self._dispatcher
            uptime_ns = max(1, now_ns - self._begun_ns)
            return self._metrics.report(
                queue_length=len(dispatcher.queue),
                running=dispatcher.running,
                prediction_error=dispatcher.controller.mean_error,
                prediction_absolute_error=dispatcher.controller.mean_absolute_error,
                executors=tuple(
                    _executor_metrics(resource, now_ns, uptime_ns) for resource in dispatcher.pool.resources
                ),
                uptime_s=uptime_ns / 1e9,
            )

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Let nothing more in, and end.

        Args:
            drain: run what waits first; False ends it with ClosedError.
            timeout_s: the longest to wait for what waits and runs; what then still waits ends with ClosedError. None
                for no limit.
        """
        if self._gone is _FORKED:
            return
        with self._lock:
            self._dispatcher.is_closed = True
            self._gone = self._gone or _CLOSED
            if not drain:
                self._dispatcher.drop_waiting(_dropped)
            waiters = self._take_space()
        try:
            self._finish(waiters)
            with self._lock:
                self._quiet.wait_for(lambda: self._dispatcher.is_quiet, timeout_s)
                self._dispatcher.drop_waiting(_dropped)
            self._finish()
        finally:  # whatever a callback of what was dropped does
            self._stop(timeout_s)

    def _stop(self, timeout_s: float | None) -> None:
        """End the threads, but for those that are stuck in a batch."""
        for worker in self._workers.values():
            worker.stop()
        self._timekeeper.stop()
        stuck = {resource for resource in self._workers if resource.batch is not None}
        for resource, worker in self._workers.items():
            worker.join(0 if resource in stuck else timeout_s)
        self._timekeeper.join(timeout_s)
        self._unregister()

    def forked(self) -> object:
        """Called in a forked child, which has none of the threads."""
        self._gone = _FORKED
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._dispatcher.is_closed = True
        self._unregister()
        return self._dispatcher

    def __enter__(self) -> Self:
        if self._gone is not None:
            raise ClosedError(self._gone)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[object, ...]:
        """copy, deepcopy and pickle come here."""
        raise TypeError("a scheduler has threads and cannot be copied: make one in each process")

    def _submit(self, request: Request) -> Future[Any]:
        if request.rows == 0:
            return self._answer_nothing(request)
        future, dispatcher = request.future, self._dispatcher
        try:
            with self._lock:
                if self._gone is not None:
                    raise ClosedError(self._gone)
                dispatcher.submit(request, self._clock_ns())
                future.request, future.withdraw = request, self._withdraw
                self._metrics.accepted()
                found: Sequence[Assignment] = ()
                moment_ns = request.deadline_ns
                if dispatcher.pool.has_idle:
                    found = dispatcher.dispatch(self._clock_ns())
                    moment_ns = dispatcher.next_tick_ns()
        except ClosedError:
            self._metrics.refused("closed")
            raise
        if found:
            self._hand_out(found)
            resource, batch = found[0]
            if batch.requests[0] is request and len(batch.requests) == 1:
                worker = self._workers[resource]
                if worker.runner.is_lent:
                    future.run_here = functools.partial(worker.run_here, request.sequence)
        if moment_ns is not None:
            self._timekeeper.ask(moment_ns)
        if dispatcher.endings:
            self._finish()
        return future

    def _refused(self, refusal: QueueFullError | DeadlineError) -> float:
        """Count a refusal.

        Returns:
            Seconds to sleep before the caller is told, where refusals come faster than executors can do with.
        """
        self._metrics.refused("deadline" if isinstance(refusal, DeadlineError) else "queue_full")
        return self._pace.pause_s(refusal, self._clock_ns(), has_idle=self._dispatcher.pool.has_idle)

    def _answer_nothing(self, request: Request) -> Future[Any]:
        """No rows need no executor."""
        if self._gone is not None:
            raise ClosedError(self._gone)
        empty = {
            name: np.frombuffer(b"", dtype).reshape(0, *shape)
            for (name, dtype), shape in zip(self._inputs, request.row_shapes, strict=True)
        }
        answers = self._model.predict(empty, request.tasks)
        request.future.set_running_or_notify_cancel()
        request.future.set_result(answers[request.tasks[0]] if request.is_single else answers)
        return request.future

    def _hand_out(self, assignments: Sequence[Assignment]) -> None:
        for assignment in assignments:
            self._workers[assignment.resource].put(assignment)

    def _work(self, runner: Runner, assignment: Assignment) -> None:
        """Run one batch, in its executor's thread."""
        try:
            packed, answers = self._run(runner, assignment)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the requests' callers are told
            self._failed(assignment, error)
            return
        self._tell(assignment, packed, answers)

    def _work_here(self, runner: Runner, assignment: Assignment) -> None:
        """Run one batch in the thread of a caller who waits for it alone.

        What fails there may be that thread's fault, such as an exception that somebody sent to it, and is held against
        no executor: the executor's own thread runs the batch again.

        Raises:
            BaseException: what was raised in the thread, unless it is an Exception and the batch is run again.
        """
        try:
            packed, answers = self._run(runner, assignment)
            self._tell(assignment, packed, answers)
        except BaseException as error:
            if assignment.resource.batch is not assignment.batch:  # it was run
                raise
            if not self._workers[assignment.resource].give_back(assignment):
                self._failed(assignment, error)
            if not isinstance(error, Exception):
                raise

    def _run(self, runner: Runner, assignment: Assignment) -> tuple[PackedRows, list[Any]]:
        packed = pack_rows(assignment.batch.requests, self._inputs)
        return packed, take_answers(packed, runner.run(packed.feeds, packed.rows, packed.parts))

    def _failed(self, assignment: Assignment, error: BaseException) -> None:
        """A batch could not be run."""
        with self._lock:
            self._dispatcher.failed(assignment, error, self._clock_ns())
        self._go_on()

    def _tell(self, assignment: Assignment, packed: PackedRows, answers: Sequence[Any]) -> None:
        """A batch was run: give its callers their answers."""
        with self._lock:
            done_ns = self._clock_ns()
            is_wanted = self._dispatcher.completed(assignment, done_ns)
        try:
            if is_wanted:
                answer_all([request.future for request in packed.requests], answers)
        finally:  # whatever a caller's callback does
            if is_wanted:
                self._metrics.answered(packed.requests, packed.rows, done_ns)
            self._go_on()

    def _go_on(self) -> None:
        """An executor came back and its callers were told: begin what waits."""
        dispatcher = self._dispatcher
        with self._lock:
            now_ns = self._clock_ns()
            found = dispatcher.dispatch(now_ns)
            moment_ns = dispatcher.next_tick_ns()
            waiters = self._after_event()
        if found:
            self._hand_out(found)
        if moment_ns is not None:
            self._timekeeper.ask(moment_ns)
        if waiters or dispatcher.endings:
            self._finish(waiters)

    def _tick(self) -> int | None:
        """A moment has come that was asked for, in the timekeeper's thread."""
        with self._lock:
            found = self._dispatcher.tick(self._clock_ns())
            moment_ns = self._dispatcher.next_tick_ns()
            waiters = self._after_event()
        self._hand_out(found)
        self._finish(waiters)
        return moment_ns

    def _cancel(self, request: Request) -> None:
        """The caller has cancelled a future that had not begun."""
        with self._lock:
            self._dispatcher.cancel(request)
            waiters = self._after_event()
        self._finish(waiters)

    def _when_space(self, told: Callable[[], object]) -> None:
        with self._lock:
            if not self._dispatcher.queue.is_full or self._gone is not None:
                waits = False
            else:
                self._space.append(told)
                waits = True
        if not waits:
            told()

    def _after_event(self) -> list[Callable[[], object]]:
        """Wake close where nothing is left to wait for; under the lock.

        Returns:
            Who waits for a place in the queue and may try now.
        """
        if self._gone is not None and self._dispatcher.is_quiet:
            self._quiet.notify_all()
        return self._take_space()

    def _take_space(self) -> list[Callable[[], object]]:
        """Who waits for a place in the queue and may try now; under the lock."""
        if not self._space or (self._dispatcher.queue.is_full and self._gone is None):
            return []
        waiters, self._space = self._space, []
        return waiters

    def _finish(self, waiters: Sequence[Callable[[], object]] = ()) -> None:
        """Complete futures of requests that ended without an answer, and wake who waits; with no lock held."""
        with self._lock:
            endings, self._dispatcher.endings = self._dispatcher.endings, []
        for _, outcome, _ in endings:
            self._metrics.ended(outcome)
        for told in waiters:
            told()
        fail_all([(request.future, error) for request, _, error in endings if error is not None])


def _wake(loop: asyncio.AbstractEventLoop, freed: asyncio.Event) -> None:
    """Tell a coroutine from another thread; none waits any more where its loop was closed."""
    try:
        loop.call_soon_threadsafe(freed.set)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _dropped() -> ClosedError:
    return ClosedError("the scheduler was closed before this request ran: make another one, and ask it again")


def _executor_metrics(resource: Resource, now_ns: int, uptime_ns: int) -> ExecutorMetrics:
    batch = resource.batch
    busy_ns = resource.busy_ns + (0 if batch is None else now_ns - batch.started_ns)
    return ExecutorMetrics(
        name=resource.name,
        state=resource.state,
        batches=resource.batches,
        busy_s=busy_ns / 1e9,
        utilization=min(1.0, busy_ns / uptime_ns),
        error=None if resource.error is None else f"{type(resource.error).__name__}: {resource.error}",
    )


def _close_at_exit(scheduler: Scheduler) -> Callable[[], None]:
    """Close a forgotten scheduler when the interpreter ends, before it takes its threads away."""
    reference = weakref.ref(scheduler)

    def close() -> None:
        forgotten = reference()
        if forgotten is not None:
            forgotten.close(drain=False, timeout_s=5.0)

    atexit.register(close)
    return lambda: atexit.unregister(close)

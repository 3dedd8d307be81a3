"""The future that a caller holds: concurrent.futures' own, but light enough to make one for every row.

`Future.__init__` makes a Condition, a lock, a deque and two lists, and every call takes that lock: a quarter of what a
request costs the scheduler. Most futures of a batch are never waited for, since one of them is and the others are
done by then. So here the condition is made when somebody asks for it, what is done is read without a lock, and a batch
is answered under one lock.

What changes a state, or looks at one to act on it, holds `_LOCK`; on a watched future, whose condition was made, the
change to a final state is made under the condition too, as `concurrent.futures.wait` and `as_completed` expect. The
order is: condition, then `_LOCK`; nobody calls out under either.

The states and three attributes are concurrent.futures' own and have no public names: `wait` and `as_completed` read them.
test_request_future.py holds this class against Future step by step, on whatever Python runs it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from typing import Any

__all__ = ["RequestFuture", "answer_all", "fail_all"]

_CANCELLED = (CANCELLED, CANCELLED_AND_NOTIFIED)
_DONE = (FINISHED, CANCELLED, CANCELLED_AND_NOTIFIED)
_LOCK = threading.Lock()
_CALLS_NESTED = 50


class RequestFuture(Future[Any]):
    """A future that tells the scheduler at once when its caller cancels it.

    Attributes:
        request: the Request that it is the future of, while that can be taken back.
        withdraw: called with `request` once the future is cancelled.
        run_here: runs the request in the calling thread, unless its executor's thread has begun to; for who waits
            anyway. None where it was not the only one of its batch, and once somebody has called it.
    """

    request: Any = None
    withdraw: Callable[[Any], object] | None = None
    run_here: Callable[[], object] | None = None

    _state = PENDING
    _result = None
    _exception = None
    _done_callbacks: list[Callable[[Future[Any]], object]] = []  # noqa: RUF012 - never changed, only replaced
    _is_watched = False

    def __init__(self) -> None:  # what Future.__init__ would set is made when it is asked for
        pass

    def __getattr__(self, name: str) -> Any:
        if name != "_condition":
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self
            )
        with _LOCK:
            if not self._is_watched:
                self._waiters = []
                self._condition = threading.Condition()
                self._is_watched = True
        return self._condition

    def cancel(self) -> bool:
        """As Future.cancel: True until the request runs. The request leaves the queue in this call."""
        with self._condition:
            with _LOCK:
                if self._state != PENDING:
                    return self._state in _CANCELLED
                self._state = CANCELLED
                request, self.request = self.request, None
            self._condition.notify_all()
        self._invoke_callbacks()
        if request is not None and self.withdraw is not None:
            self.withdraw(request)
        return True

    def cancelled(self) -> bool:
        """As Future.cancelled."""
        return self._state in _CANCELLED

    def running(self) -> bool:
        """As Future.running."""
        return self._state == RUNNING

    def done(self) -> bool:
        """As Future.done."""
        return self._state in _DONE

    def result(self, timeout: float | None = None) -> Any:
        """As Future.result."""
        if self._state == FINISHED and self._exception is None:
            return self._result
        if timeout is None:
            self._help()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As Future.exception."""
        if self._state == FINISHED:
            return self._exception
        if timeout is None:
            self._help()
        return super().exception(timeout)

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """As Future.add_done_callback."""
        with _LOCK:
            if self._state not in _DONE:
                self._done_callbacks = [*self._done_callbacks, fn]
                return
        super().add_done_callback(fn)

    def set_running_or_notify_cancel(self) -> bool:
        """As Future.set_running_or_notify_cancel; the request cannot be taken back from here on."""
        with _LOCK:
            if self._state == PENDING:
                self._state = RUNNING
                self.request = None
                return True
        return super().set_running_or_notify_cancel()

    def set_result(self, result: Any) -> None:
        """As Future.set_result."""
        self._end(result, None)
        self._invoke_callbacks()

    def set_exception(self, exception: BaseException | None) -> None:
        """As Future.set_exception."""
        self._end(None, exception)
        self._invoke_callbacks()

    def _help(self) -> None:
        """Run the request in this thread rather than sleep while another wakes to run it.

        Not in the main thread: signal handlers run there, and what they raise is not the batch's failure. Not where
        there are callbacks: they would run before the caller goes on, who may hold a lock that they want. And not near
        the end of Python's stack, where the scheduler's own steps could fail midway.
        """
        run_here, self.run_here = self.run_here, None
        if (
            run_here is not None
            and self._state == RUNNING
            and not self._done_callbacks
            and threading.current_thread() is not threading.main_thread()
            and _has_room()
        ):
            run_here()

    def _end(self, result: Any, exception: BaseException | None) -> None:
        """Everything but the callbacks."""
        with self._condition:
            with _LOCK:
                if self._state in _DONE:
                    raise InvalidStateError(f"{self._state}: a request ended twice")
                self._result, self._exception = result, exception
                self._state = FINISHED
            for waiter in self._waiters:
                if exception is None:
                    waiter.add_result(self)
                else:
                    waiter.add_exception(self)
            self._condition.notify_all()


def answer_all(futures: Sequence[RequestFuture], results: Sequence[Any]) -> None:
    """Give each of some running futures its result, as set_result would one by one; with no lock held.

    Args:
        futures: none of them done.
        results: as many.

    Raises:
        BaseException: a callback raised what is no Exception, as sys.exit() does; once all the others were called.
    """
    watched = []
    with _LOCK:
        for future, result in zip(futures, results, strict=True):
            if future._is_watched:
                watched.append((future, result))
            else:
                future._result = result
                future._state = FINISHED
    for future, result in watched:
        future._end(result, None)
    _call_back([future for future in futures if future._done_callbacks])


def fail_all(errors: Sequence[tuple[RequestFuture, BaseException]]) -> None:
    """Give each of some futures its error, as set_exception would one by one; with no lock held.

    Raises:
        BaseException: as answer_all.
    """
    for future, error in errors:
        future._end(None, error)
    _call_back([future for future, _ in errors])


def _call_back(futures: Iterable[RequestFuture]) -> None:
    raised: BaseException | None = None
    for future in futures:
        try:
            future._invoke_callbacks()  # which logs every Exception
        except BaseException as error:  # noqa: BLE001 - raised below, after the others had their turn
            raised = raised or error
    if raised is not None:
        raise raised


def _has_room() -> bool:
    """Whether as many calls as the scheduler nests, and some more, fit under Python's recursion limit."""
    try:
        _descend(_CALLS_NESTED)
    except RecursionError:
        return False
    return True


def _descend(calls: int) -> None:
    if calls:
        _descend(calls - 1)


def _forked() -> None:
    """Another thread of the parent may have held the lock."""
    global _LOCK  # noqa: PLW0603 - one for the process
    _LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

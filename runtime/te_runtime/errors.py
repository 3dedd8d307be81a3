"""The error tree of te_runtime; each error owns the exit code that the command line maps it to.

TeRuntimeError
├── BundleError      the bundle on disk is not what its manifest says (exit 2)
├── InputError       what the caller passed does not fit the model (exit 2)
├── ClosedError      the model was used after close() (exit 2)
├── ProviderError    ONNX Runtime or the execution provider asked for is not there (exit 3)
└── SchedulerError   a request to the scheduler was not answered (exit 2)
    ├── QueueFullError   as many requests wait as may
    ├── DeadlineError    it cannot be answered in time, or was not
    └── StallError       an executor does not come back from a batch
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BundleError",
    "ClosedError",
    "DeadlineError",
    "InputError",
    "ProviderError",
    "QueueFullError",
    "SchedulerError",
    "StallError",
    "TeRuntimeError",
]


class TeRuntimeError(Exception):
    """Base of every error te_runtime raises on purpose."""

    exit_code: ClassVar[int] = 2


class BundleError(TeRuntimeError):
    """The bundle is damaged, incomplete, of an unknown version, or not a bundle."""


class InputError(TeRuntimeError, ValueError):
    """An argument does not fit the model: name, shape, dtype, task or value."""


class ClosedError(TeRuntimeError):
    """The model was used after it was closed."""


class ProviderError(TeRuntimeError):
    """ONNX Runtime is missing, installed twice, or cannot give the execution provider asked for."""

    exit_code: ClassVar[int] = 3


class SchedulerError(TeRuntimeError):
    """A request to the scheduler was not answered."""


class QueueFullError(SchedulerError):
    """As many requests wait as may.

    Attributes:
        capacity: how many that is.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.capacity = capacity

    def __str__(self) -> str:
        return (
            f"the queue is full: {self.capacity} requests wait, as many as max_queue allows. Ask again later, pass "
            'when_full="block" to wait for a place, or give deadlines, so that what would be late is refused sooner'
        )


class DeadlineError(SchedulerError):
    """A request cannot be answered before its deadline, or waited until it had passed.

    Attributes:
        allowed_ms: from its submission to its deadline.
        predicted_ms: from its submission to when it would have been answered, where it was refused for that.
        waited_ms: how long it waited, where it was let in; it was never run.
    """

    def __init__(
        self, allowed_ms: float, predicted_ms: float | None = None, waited_ms: float | None = None
    ) -> None:
        super().__init__(allowed_ms, predicted_ms, waited_ms)
        self.allowed_ms = allowed_ms
        self.predicted_ms = predicted_ms
        self.waited_ms = waited_ms

    def __str__(self) -> str:
        # Put into words only where somebody reads it: under overload most of these are counted and thrown away.
        if self.predicted_ms is not None:
            return (
                f"refused: it would be answered after {self.predicted_ms:.3g} ms, its deadline is {self.allowed_ms:.3g} ms. "
                "Send fewer requests, allow more time, or raise its priority"
            )
        return (
            f"its deadline of {self.allowed_ms:.3g} ms passed while it waited for {self.waited_ms or 0.0:.3g} ms, so it "
            "was not run. Send fewer requests, allow more time, or raise its priority"
        )


class StallError(SchedulerError):
    """An executor does not come back from a batch.

    Attributes:
        executor: its name.
        limit_s: how long it was waited for, seconds.
    """

    def __init__(self, executor: str, limit_s: float) -> None:
        super().__init__(executor, limit_s)
        self.executor = executor
        self.limit_s = limit_s

    def __str__(self) -> str:
        return (
            f"executor {self.executor} has not come back from a batch within {self.limit_s:g} s and no other could "
            "answer. See whether the device hangs; for slow models pass a larger stall_timeout_s"
        )

"""Load for what answers requests: clients that keep a window of them outstanding, and arrivals that wait for nobody.

Clients share Python's lock and the CPUs with what they measure, so they do little: rows and tasks are made before,
answers are taken from a deque of futures in the order of submission, and a client sleeps only when its window is
full. Arrivals are sent by one thread that sleeps until the next one is due and then sends all that are. A request
counts from when it was to arrive, not from when the thread came to it: that the generator is late, or waits for
Python's lock, is time that the request waited (no coordinated omission).
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from te_runtime import DeadlineError, QueueFullError

__all__ = [
    "Arrivals",
    "Client",
    "OpenRun",
    "Rate",
    "Row",
    "Stream",
    "Submit",
    "WindowClient",
    "drive",
    "machine_cpu_s",
    "poisson_arrivals",
    "send",
]

Row = NDArray[np.float32]

_LEAST_SLEEP_NS = 150_000
_STREAM = 4096
_GRACE_S = 30.0


class Submit(Protocol):
    """What takes requests: a scheduler's submit, or a fake of it."""

    def __call__(self, x: Row, *, task: str, deadline_ms: float | None = None) -> Future[Any]: ...


class Stream:
    """Requests made before: one row and one task each, drawn evenly, over and over."""

    def __init__(self, tasks: Sequence[str], *, width: int, seed: int, rows: int = 256) -> None:
        rng = np.random.default_rng(seed)
        self.rows = [rng.standard_normal((1, width), dtype=np.float32) for _ in range(rows)]
        drawn = rng.integers(len(tasks), size=_STREAM)
        self.requests = [(self.rows[place % rows], tasks[task]) for place, task in enumerate(drawn)]

    def __iter__(self) -> Iterator[tuple[Row, str]]:
        return itertools.cycle(self.requests)


class Client(Protocol):
    """One caller in a closed loop."""

    def run(self, until_ns: int) -> int:
        """Ask until then; how many answers came."""

    def finish(self) -> None:
        """Take the answers that are still to come."""


class WindowClient:
    """Keeps up to `window` requests outstanding and waits for the oldest."""

    def __init__(self, submit: Submit, stream: Stream, *, window: int) -> None:
        self._submit = submit
        self._requests = iter(stream)
        self._window = window
        self._waiting: deque[Future[Any]] = deque()

    def run(self, until_ns: int) -> int:
        """As Client.run."""
        submit, waiting, window, requests = self._submit, self._waiting, self._window, self._requests
        clock_ns = time.perf_counter_ns
        answers = 0
        while clock_ns() < until_ns:
            for _ in range(window - len(waiting)):
                row, task = next(requests)
                waiting.append(submit(row, task=task))
            waiting.popleft().result()
            answers += 1
            while waiting and waiting[0].done():
                waiting.popleft().result()
                answers += 1
        return answers

    def finish(self) -> None:
        """As Client.finish."""
        while self._waiting:
            self._waiting.popleft().result(_GRACE_S)


@dataclass(frozen=True)
class Rate:
    """What clients in a closed loop reached.

    Attributes:
        per_s: answers per second, of all clients together.
        client_cpus: CPUs that the clients' own threads took, what they call included.
        cpus: CPUs that the whole process took.
        other_cpus: CPUs that everything else on the machine took, stolen time included; nan where Linux does not tell.
    """

    per_s: float
    client_cpus: float
    cpus: float
    other_cpus: float


@dataclass
class _Share:
    """What one client's thread found."""

    answers: int = 0
    cpu_s: float = 0.0
    error: BaseException | None = None


def drive(clients: Sequence[Client], *, seconds: float, warm_s: float = 0.2) -> Rate:
    """Run every client in a thread of its own; the first `warm_s` do not count."""
    gate = threading.Barrier(len(clients) + 1)
    shares = [_Share() for _ in clients]
    times: list[int] = []

    def serve(client: Client, share: _Share) -> None:
        gate.wait()
        begin_ns = times[0] + round(warm_s * 1e9)
        try:
            client.run(begin_ns)
            cpu_s = time.thread_time()
            share.answers = client.run(begin_ns + round(seconds * 1e9))
            share.cpu_s = time.thread_time() - cpu_s
            client.finish()
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            share.error = error

    threads = [threading.Thread(target=serve, args=pair) for pair in zip(clients, shares, strict=True)]
    for thread in threads:
        thread.start()
    times.append(time.perf_counter_ns())
    gate.wait()
    time.sleep(warm_s)
    cpu_s, machine_s, begun_s = time.process_time(), machine_cpu_s(), time.perf_counter()
    time.sleep(seconds)
    slept_s = time.perf_counter() - begun_s
    cpu_s, machine_s = time.process_time() - cpu_s, machine_cpu_s() - machine_s
    for thread in threads:
        thread.join()
    for share in shares:
        if share.error is not None:
            raise share.error
    answers = sum(share.answers for share in shares)
    return Rate(
        per_s=answers / seconds,
        client_cpus=sum(share.cpu_s for share in shares) / seconds,
        cpus=cpu_s / slept_s,
        other_cpus=(machine_s - cpu_s) / slept_s,
    )


def machine_cpu_s(stat: Path = Path("/proc/stat")) -> float:
    """CPU time that everything on the machine has taken since it started, and that was stolen from it, seconds.

    Args:
        stat: where Linux tells it; a test passes its own.

    Returns:
        nan where the system does not tell, as outside Linux.
    """
    try:
        user, nice, system, _idle, _wait, irq, soft, steal = map(int, stat.read_text().split()[1:9])
    except OSError:
        return math.nan
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Arrivals:
    """When requests arrive.

    Attributes:
        rate_per_s: on average.
        duration_s: the last arrival is before this.
        times_ns: of each, from the beginning, ascending.
    """

    rate_per_s: float
    duration_s: float
    times_ns: list[int]


def poisson_arrivals(rate_per_s: float, duration_s: float, seed: int) -> Arrivals:
    """Arrivals of callers who know nothing of each other."""
    rng = np.random.default_rng(seed)
    count = rng.poisson(rate_per_s * duration_s)
    times = np.sort(rng.uniform(0, duration_s * 1e9, count)).astype(np.int64)
    return Arrivals(rate_per_s, duration_s, times.tolist())


@dataclass
class OpenRun:
    """What became of arrivals.

    Attributes:
        arrivals: when they were planned.
        hopeless: how many were past their deadline before the generator came to them, and not sent.
        behind_ns: how late each of the others was sent.
        ended_ns: when each answer came, from the beginning.
        latencies_ns: of each answer, from its planned arrival.
        waits_ns: the same from its submission.
        refused_ns: how long submit took to refuse, for each that it refused.
        errors: requests let in that ended with an error, by its class's name.
        generator_cpus: CPUs that the generator's thread took, submit included.
        other_cpus: as Rate.other_cpus.
    """

    arrivals: Arrivals
    hopeless: int = 0
    behind_ns: list[int] = field(default_factory=list)
    ended_ns: list[int] = field(default_factory=list)
    latencies_ns: list[int] = field(default_factory=list)
    waits_ns: list[int] = field(default_factory=list)
    refused_ns: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    generator_cpus: float = 0.0
    other_cpus: float = 0.0

    @property
    def sent(self) -> int:
        """How many were submitted before the run's time was over."""
        return len(self.behind_ns)

    @property
    def admitted(self) -> int:
        """How many of them were let in."""
        return self.sent - len(self.refused_ns)

    @property
    def sent_per_s(self) -> float:
        """Requests submitted per second of the run."""
        return self.sent / self.arrivals.duration_s

    def share_answered_by_end(self, grace_s: float) -> float:
        """Of all that were planned, those that were answered by so long after the run's time was over."""
        limit_ns = (self.arrivals.duration_s + grace_s) * 1e9
        return sum(ended <= limit_ns for ended in self.ended_ns) / len(self.arrivals.times_ns)

    def in_time(self, deadline_ms: float) -> int:
        """Answers within a deadline that counts from the planned arrival."""
        return sum(latency <= deadline_ms * 1e6 for latency in self.latencies_ns)

    def in_time_from_submission(self, deadline_ms: float) -> int:
        """Answers within a deadline that counts from submission."""
        return sum(wait <= deadline_ms * 1e6 for wait in self.waits_ns)


def send(
    submit: Submit,
    stream: Stream,
    arrivals: Arrivals,
    *,
    deadline_ms: float | None,
    from_arrival: bool = True,
) -> OpenRun:
    """Send requests when they arrive, from this thread, and wait for the last answer.

    What the generator has not come to when the run's time is over is never sent. No future is kept: hundreds of thousands
    of them would have Python's garbage collector stop every thread for tens of milliseconds.

    Args:
        deadline_ms: of every request; None for none.
        from_arrival: the deadline counts from the planned arrival, and what is past it when the generator comes to it
            is hopeless and not sent; False: from submission.
    """
    run = OpenRun(arrivals)
    clock_ns, cpu_s = time.perf_counter_ns, time.thread_time()
    others_s = machine_cpu_s() - time.process_time()
    begun_ns = clock_ns()
    over_ns = begun_ns + round(arrivals.duration_s * 1e9)
    note = partial(_note, run, begun_ns)
    allowed_ms = deadline_ms
    for (row, task), time_ns in zip(stream, arrivals.times_ns, strict=False):
        due_ns = begun_ns + time_ns
        now_ns = clock_ns()
        if now_ns < due_ns:
            time.sleep(max(due_ns - now_ns, _LEAST_SLEEP_NS) / 1e9)
            now_ns = clock_ns()
        if now_ns > over_ns:
            break
        if from_arrival and deadline_ms is not None:
            allowed_ms = deadline_ms - (now_ns - due_ns) / 1e6
            if allowed_ms <= 0:
                run.hopeless += 1
                continue
        run.behind_ns.append(now_ns - due_ns)
        try:
            future = submit(row, task=task, deadline_ms=allowed_ms)
        except (DeadlineError, QueueFullError):
            run.refused_ns.append(clock_ns() - now_ns)
        else:
            future.add_done_callback(partial(note, due_ns, now_ns))
    run.generator_cpus = (time.thread_time() - cpu_s) / arrivals.duration_s
    _await_all(run)
    others_s = machine_cpu_s() - time.process_time() - others_s
    run.other_cpus = others_s * 1e9 / (clock_ns() - begun_ns)
    return run


def _note(run: OpenRun, begun_ns: int, due_ns: int, sent_ns: int, future: Future[Any]) -> None:
    """A request has ended; in the thread that ended it."""
    now_ns = time.perf_counter_ns()
    error = future.exception()
    if error is not None:
        run.errors.append(type(error).__name__)
        return
    run.ended_ns.append(now_ns - begun_ns)
    run.latencies_ns.append(now_ns - due_ns)
    run.waits_ns.append(now_ns - sent_ns)


def _await_all(run: OpenRun) -> None:
    over = time.monotonic() + _GRACE_S
    while (ended := len(run.waits_ns) + len(run.errors)) < run.admitted:
        if time.monotonic() > over:
            raise SystemExit(
                f"{run.admitted - ended} requests have not ended {_GRACE_S:g} s after the last arrival"
            )
        time.sleep(0.001)
    if ended > run.admitted:
        raise SystemExit(f"{run.admitted} requests were let in and {ended} ended")

"""A clock that only moves when a test lets it, and models that take as long as a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

from te_runtime.bench_scenarios import Call
from te_runtime.bench_subject import Subject
from te_runtime.plan import Plan
from te_runtime.providers import ProviderChoice

MS = 1_000_000


class FakeClock:
    """Stands still until something is spent."""

    def __init__(self) -> None:
        self.now_ns = 7 * MS
        self.used_ns = 0
        self.waits: list[int] = []

    def wall_ns(self) -> int:
        return self.now_ns

    def cpu_ns(self) -> int:
        return self.used_ns

    def wait_until(self, wall_ns: int) -> None:
        self.waits.append(wall_ns)
        self.now_ns = max(self.now_ns, wall_ns)

    def calls(self, times_ns: Iterator[int]) -> Call:
        """A call that takes the next of the times, half of it on the CPU; a time below 0 is Ctrl-C."""

        def call(_number: int) -> None:
            time_ns = next(times_ns)
            if time_ns < 0:
                raise KeyboardInterrupt
            self.now_ns += time_ns
            self.used_ns += time_ns // 2

        return call


class Shown:
    """Progress, kept."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, float]] = []

    def show(self, what: str, part: float) -> None:
        self.lines.append((what, part))

    def clear(self) -> None:
        pass


def subject(
    clock: FakeClock,
    *,
    name: str = "fake-onnx",
    times: Callable[[int], Iterator[int]] = lambda rows: repeat(rows * MS),
) -> Subject:
    """A bundle of 20 MB, whose calls of n rows take what `times(n)` says: n ms by itself."""
    return Subject(
        path=Path(name),
        precision="fp32",
        choice=ProviderChoice("cpu", "cpu", "asked for", None),
        ran_on="cpu",
        threads=1,
        plan=Plan("joint", ("fp32/joint.onnx",), "asked for"),
        load_ns=100 * MS,
        first_ns=3 * MS,
        pss_before_bytes=30_000_000,
        pss_ready_bytes=50_000_000,
        gpu_memory=None,
        queries=lambda rows: clock.calls(times(rows)),
        close=lambda: None,
    )

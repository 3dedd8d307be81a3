"""What the manifest says of latency, where the export measured it: true of one machine and one run."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

from te_runtime.manifest_values import check_path, require

__all__ = ["GraphLatency", "Latency"]

_LONGEST_US = 1e12
_LONGEST_NAME = 200
_MOST_BATCH = 2**31 - 1
_MOST_ROUNDS = 1_000_000
_MOST_THREADS = 4096
_MOST_RATIO = 1e12


class GraphLatency(NamedTuple):
    """One graph at one batch size, timed in turns with the fp32 graph of its kind.

    Attributes:
        path: of the joint graph or a task graph of some variant.
        batch: rows per call.
        p50_us, p10_us, p90_us: percentiles of its latency over the rounds, in microseconds.
        rounds: how many were timed.
        ratio: median over rounds of its latency over that of fp32's joint graph, or of the same task's fp32 task
            graph, in the same round; 1 for fp32 itself.
    """

    path: str
    batch: int
    p50_us: float
    p10_us: float
    p90_us: float
    rounds: int
    ratio: float

    def check(self) -> None:
        check_path(self.path)
        where = f"{self.path!r} at batch {self.batch!r:.20}"
        require(0 < self.batch <= _MOST_BATCH, f"batch of {where} is out of bounds")
        require(0 < self.rounds <= _MOST_ROUNDS, f"rounds of {where} are out of bounds: {self.rounds!r:.40}")
        require(0 < self.ratio <= _MOST_RATIO, f"ratio of {where} is out of bounds: {self.ratio!r:.40}")
        require(
            0 < self.p10_us <= self.p50_us <= self.p90_us <= _LONGEST_US,
            f"latency of {where} is {self.p10_us!r:.40}, {self.p50_us!r:.40}, {self.p90_us!r:.40}: expected "
            f"0 < p10_us <= p50_us <= p90_us <= {_LONGEST_US:g}",
        )


class Latency(NamedTuple):
    """What was measured, on what.

    Attributes:
        machine: model of the CPU.
        onnxruntime: version.
        provider: what ran the graphs.
        threads: of a session.
        graphs: an entry for each graph and batch size that was timed.
    """

    machine: str
    onnxruntime: str
    provider: Literal["cpu", "cuda"]
    threads: int
    graphs: tuple[GraphLatency, ...]

    def check(self) -> None:
        for what, name in (("machine", self.machine), ("onnxruntime", self.onnxruntime)):
            require(
                0 < len(name) <= _LONGEST_NAME,
                f"{what} {name!r:.80} must have 1 to {_LONGEST_NAME} characters",
            )
        require(0 < self.threads <= _MOST_THREADS, f"threads are out of bounds: {self.threads!r:.40}")
        require(bool(self.graphs), "graphs is empty")
        seen: set[tuple[str, int]] = set()
        for entry in self.graphs:
            key = (entry.path.lower(), entry.batch)
            require(key not in seen, f"{entry.path!r} at batch {entry.batch} stands twice")
            seen.add(key)

    def check_graphs(self, fp32: Collection[str], others: Collection[str]) -> None:
        """Refuse what is no joint and no task graph of the bundle.

        Args:
            fp32: paths of the joint graph and the task graphs of fp32.
            others: the same of every other variant.

        Raises:
            StrictJsonError: an entry is of another file, or an fp32 graph is not its own measure.
        """
        for entry in self.graphs:
            known = entry.path in fp32 or entry.path in others
            require(known, f"latency of {entry.path!r}, which is no joint graph and no task graph")
            as_told = entry.path not in fp32 or entry.ratio == 1
            require(as_told, f"latency of {entry.path!r}: ratio {entry.ratio!r:.40}, expected 1 for fp32")

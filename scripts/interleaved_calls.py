"""Times graphs against each other in one process, with one thread.

Sessions take turns in an order drawn anew for each round. A turn is two calls to bring a graph's weights back
into the caches and then a few that are timed one by one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from reference_graphs import INPUT_DIM

BATCH_SIZES = (1, 8, 64)
WARM_CALLS = 2
TIMED_CALLS = 6


@dataclass(frozen=True)
class Measured:
    """Timed calls of one graph at one batch size in one repetition, TIMED_CALLS for each round."""

    tasks: int
    repetition: int
    batch: int
    graph: str
    samples_us: list[float]

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.samples_us, percent))

    def by_round(self) -> NDArray[np.float64]:
        """The median of each round, (rounds,) in µs."""
        rounds = np.array(self.samples_us).reshape(-1, TIMED_CALLS)
        medians: NDArray[np.float64] = np.median(rounds, axis=1)
        return medians


def open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure(paths: Mapping[str, Path], *, repetitions: int, seconds: float, tasks: int) -> list[Measured]:
    """Time the graphs at paths, by name, at every batch size.

    Args:
        seconds: for each repetition and batch size.
        tasks: how many the model has, to be kept beside the samples.
    """
    sessions = {name: open_session(path) for name, path in paths.items()}
    rng = random.Random(0)
    found = []
    for repetition in range(repetitions):
        for batch in BATCH_SIZES:
            x = np.random.default_rng(batch).standard_normal((batch, INPUT_DIM)).astype(np.float32)
            feeds = {name: {session.get_inputs()[0].name: x} for name, session in sessions.items()}
            samples = time_calls(sessions, feeds, seconds=seconds, rng=rng)
            found += [Measured(tasks, repetition, batch, name, times) for name, times in samples.items()]
    return found


def time_calls(
    sessions: Mapping[str, onnxruntime.InferenceSession],
    feeds: Mapping[str, Mapping[str, NDArray[np.float32]]],
    *,
    seconds: float,
    rng: random.Random,
) -> dict[str, list[float]]:
    """Latencies in µs, by name."""
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    order = list(sessions)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        rng.shuffle(order)
        for name in order:
            session, feed = sessions[name], feeds[name]
            for _ in range(WARM_CALLS):
                session.run(None, feed)
            for _ in range(TIMED_CALLS):
                begun = time.perf_counter_ns()
                session.run(None, feed)
                samples[name].append((time.perf_counter_ns() - begun) / 1e3)
    return samples

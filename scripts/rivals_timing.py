"""Times calls against each other: all take turns, in an order drawn anew for each round.

A turn is one or two calls to bring a subject's weights back into the caches and then a few that are timed one by one;
how many depends on how long a call takes. A first round is thrown away.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

TIMED_CALLS = 6
MAX_ROUNDS = 200
SHORT_CALL_NS = 5_000_000
"""Up to here a turn warms up with two calls; a longer call sweeps the caches anew each time it runs."""
TURN_NS = 30_000_000
"""What the timed calls of a turn may take together, if they are more than one."""

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class TimingOptions:
    """How long a point is measured.

    Attributes:
        seconds: a round that would begin later does not begin.
        least_rounds: run even where they take longer.
        pause_seconds: before each turn, so that threads of the turn before have stopped waiting for work.
        seed: of the order of turns.
    """

    seconds: float
    least_rounds: int
    pause_seconds: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Clock:
    """What tells the time and lets it pass; a test passes its own."""

    now_ns: Callable[[], int] = time.perf_counter_ns
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class _Turn:
    warm: int
    timed: int


def time_in_rounds(
    calls: Mapping[Name, Call], options: TimingOptions, clock: Clock | None = None
) -> dict[Name, list[list[float]]]:
    """Latencies in µs by name, a list for each round."""
    clock = clock or Clock()
    rng = random.Random(options.seed)
    turns = {name: _plan_turn(call, clock) for name, call in calls.items()}
    order = list(calls)
    for name in order:
        _take_turn(calls[name], turns[name], clock)
    rounds: dict[Name, list[list[float]]] = {name: [] for name in calls}
    end_ns = clock.now_ns() + round(options.seconds * 1e9)
    for done in range(MAX_ROUNDS):
        if done >= options.least_rounds and clock.now_ns() >= end_ns:
            break
        rng.shuffle(order)
        for name in order:
            if options.pause_seconds:
                clock.sleep(options.pause_seconds)
            rounds[name].append(_take_turn(calls[name], turns[name], clock))
    return rounds


def _plan_turn(call: Call, clock: Clock) -> _Turn:
    """By the second of two calls: the first may compile or allocate."""
    call()
    cost_ns = max(_time(call, clock), 1)
    return _Turn(
        warm=2 if cost_ns <= SHORT_CALL_NS else 1, timed=min(max(TURN_NS // cost_ns, 1), TIMED_CALLS)
    )


def _take_turn(call: Call, turn: _Turn, clock: Clock) -> list[float]:
    for _ in range(turn.warm):
        call()
    return [_time(call, clock) / 1e3 for _ in range(turn.timed)]


def _time(call: Call, clock: Clock) -> int:
    begun = clock.now_ns()
    call()
    return clock.now_ns() - begun

"""How fast refusals may follow each other while executors are at work.

Callers that ask again at once whenever they are refused keep Python's lock, and an executor that comes back from a graph
would wait 5 ms for it, several times per batch: overload would stop what it should only fill. So refusals take turns,
one in 100 µs, and who comes too soon sleeps; a few in a row may come at once. Only where the answer would have been
far away: executors that want for the lock take several times 5 ms for a batch, and predictions say so. A caller that
is refused while executors are well is only late himself, and has to catch up.
"""

from __future__ import annotations

from te_runtime.errors import DeadlineError, QueueFullError

__all__ = ["RefusalPace"]

_TURN_NS = 100_000
_AHEAD_NS = 300_000
_LONGEST_PAUSE_NS = 1_000_000
_FAR_AWAY_MS = 10.0


class RefusalPace:
    """One for all callers of a scheduler together; a turn that two of them take at once does no harm."""

    __slots__ = ("_next_turn_ns",)

    def __init__(self) -> None:
        self._next_turn_ns = 0

    def pause_s(self, refusal: QueueFullError | DeadlineError, now_ns: int, *, has_idle: bool) -> float:
        """Seconds to sleep before a caller is told, where refusals come faster than executors can do with.

        Args:
            refusal: what he will be told.
            now_ns: the clock's time.
            has_idle: an executor has nothing to do.
        """
        if has_idle:
            return 0.0
        if isinstance(refusal, DeadlineError) and (refusal.predicted_ms or 0.0) < _FAR_AWAY_MS:
            return 0.0
        self._next_turn_ns = turn_ns = max(self._next_turn_ns, now_ns) + _TURN_NS
        ahead_ns = turn_ns - now_ns
        return min(ahead_ns, _LONGEST_PAUSE_NS) / 1e9 if ahead_ns > _AHEAD_NS else 0.0

"""The executors, and which of them a batch should go to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Literal

from te_runtime.scheduling.latency_model import LatencyModel

if TYPE_CHECKING:
    from te_runtime.scheduling.batch import Batch

__all__ = ["Resource", "ResourcePool", "ResourceState", "first_to_finish"]

ResourceState = Literal["live", "suspect", "stuck", "out"]


@dataclass(slots=True, eq=False)
class Resource:
    """One executor as the scheduler sees it.

    Attributes:
        name: for people, such as `cpu-0`.
        latency: what batches take on it.
        state: `live`; `suspect` after a failure, until its requests were tried elsewhere; `stuck` while a batch
            takes longer than the stall limit; `out` for good.
        batch: what it runs; None while it has nothing to do.
        free_at_ns: when it is expected to be done with that.
        busy_ns: time that it has spent on batches.
        batches: how many it has answered.
        error: why it is suspect, stuck or out.
    """

    name: str
    latency: LatencyModel
    state: ResourceState = "live"
    batch: Batch | None = None
    free_at_ns: int = 0
    busy_ns: int = 0
    batches: int = 0
    error: BaseException | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it can begin a batch of the queue now."""
        return self.batch is None and self.state == "live"

    def free_from_ns(self, now_ns: int) -> int:
        """When it can begin another batch, as foreseen now; later than now unless it has nothing to do.

        A batch that takes longer than expected is thought to need as long again as it is late already: so one that
        hangs is soon not waited for any more.
        """
        if self.batch is None:
            return now_ns
        late_ns = now_ns - self.free_at_ns
        return self.free_at_ns if late_ns < 0 else now_ns + late_ns + 1


class ResourcePool:
    """Executors that differ in speed and in when they will be free.

    Attributes:
        resources: all of them.
        live: those that batches of the queue may be planned for.
        changes: counts what happened to any of them; what was foreseen holds until it is another number.
    """

    __slots__ = ("changes", "live", "resources")

    def __init__(self, resources: Iterable[Resource]) -> None:
        self.resources = tuple(resources)
        self.live = self.resources
        self.changes = 0

    def begin(self, resource: Resource, batch: Batch) -> None:
        """An idle executor is handed a batch."""
        resource.batch = batch
        resource.free_at_ns = batch.started_ns + round(batch.expected_ns)
        self.changes += 1

    def end(self, resource: Resource, batch: Batch, now_ns: int) -> None:
        """An executor has come back from its batch, with answers or without."""
        resource.batch = None
        resource.busy_ns += now_ns - batch.started_ns
        resource.free_at_ns = now_ns
        self.changes += 1

    def change_state(
        self, resource: Resource, state: ResourceState, error: BaseException | None = None
    ) -> None:
        """Every change of a state goes through here."""
        resource.state, resource.error = state, error
        self.changes += 1
        self.live = tuple(one for one in self.resources if one.state == "live")

    @property
    def capacity(self) -> float:
        """Σ r_j of the score: 1 for each executor that is not out."""
        return float(sum(resource.state != "out" for resource in self.resources))

    @property
    def has_idle(self) -> bool:
        """Whether any can begin a batch of the queue now."""
        for resource in self.live:  # noqa: SIM110 - asked for each request, and any() takes twice as long
            if resource.batch is None:
                return True
        return False

    def elsewhere(self, suspect: Resource) -> list[Resource]:
        """Where what failed on `suspect` can be tried again, now or later: others, or itself if there are none.

        None at all where it is the only one and stuck.
        """
        able = [resource for resource in self.resources if resource.state in ("live", "suspect")]
        return [resource for resource in able if resource is not suspect] or able

    def has_other(self, resource: Resource) -> bool:
        """Whether any but `resource` is neither stuck nor out."""
        return any(one.state in ("live", "suspect") for one in self.resources if one is not resource)


def first_to_finish(
    resources: Sequence[Resource], free_at: Sequence[float], tasks: int, rows: int
) -> tuple[int, float]:
    """Where a batch would be finished first.

    Args:
        resources: at least one.
        free_at: for each of them, when it can begin, nanoseconds.
        tasks: how many different tasks the batch has.
        rows: how many rows.

    Returns:
        The number of the executor, the first among equals, and when the batch is expected to be finished there.
    """
    best, earliest = 0, inf
    for number, resource in enumerate(resources):
        finish = free_at[number] + resource.latency.expect_about(tasks, rows)
        if finish < earliest:
            best, earliest = number, finish
    return best, earliest

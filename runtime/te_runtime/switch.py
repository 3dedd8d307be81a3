"""Runs the switch graph: any choice of tasks in one run of one session.

For each choice of tasks, the value of the graph's own input and the outputs to fetch are worked out once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from te_runtime.answers import AnswerReader
from te_runtime.interfaces import ASKED
from te_runtime.manifest import GraphSpec, TaskSpec
from te_runtime.prediction import Prediction
from te_runtime.providers import Provider
from te_runtime.session import FixedSession, OrtSession

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SwitchExecutor", "ask_for"]

_ROUTES_KEPT = 256  # choices of tasks; a caller that asks for more of them pays some µs again


def ask_for(chosen: Sequence[str], session: OrtSession, tasks: Sequence[str]) -> FixedSession:
    """The switch graph as a graph of some of its tasks.

    Args:
        chosen: the tasks that are asked for.
        session: the switch graph, open.
        tasks: every task, in the manifest's order.

    Returns:
        A session that reads the model's inputs and gives what the tasks promise, in the order of `chosen`.
    """
    graph = session.spec
    inputs = tuple(spec for spec in graph.inputs if spec.name != ASKED)
    outputs = tuple(
        spec for task in chosen for spec in graph.outputs if spec.name.startswith(f"{task}.")
    )  # no task name has a dot
    asked = np.array([task in chosen for task in tasks])
    return FixedSession(session, GraphSpec(graph.path, inputs, outputs), {ASKED: asked})


class _Route:
    """How one choice of tasks is asked for, and where its answers are."""

    __slots__ = ("reader", "run")

    def __init__(self, session: FixedSession, chosen: Sequence[TaskSpec], provider: Provider) -> None:
        self.run = session.run
        self.reader = AnswerReader([session.spec], [(0, task) for task in chosen], provider)


class SwitchExecutor:
    """An Executor on the switch graph: the trunk once, and the tails of the tasks asked for, in one run."""

    __slots__ = ("_inputs", "_provider", "_routes", "_session", "_tasks")

    def __init__(
        self,
        session: OrtSession,
        tasks: Sequence[TaskSpec],
        *,
        model_inputs: Sequence[str],
        provider: Provider,
    ) -> None:
        """Wrap the loaded switch graph.

        Args:
            session: the graph.
            tasks: every task, in the manifest's order.
            model_inputs: names of the model's inputs.
            provider: where the graph runs.
        """
        read = [spec.name for spec in session.spec.inputs if spec.name != ASKED]
        self._session = session
        self._tasks = {task.name: task for task in tasks}
        self._inputs = None if set(read) == set(model_inputs) else read
        self._provider = provider
        self._routes: dict[tuple[str, ...], _Route] = {}

    def run(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, tasks: Sequence[str]
    ) -> dict[str, Prediction]:
        """As Executor.run."""
        chosen = tuple(tasks)
        route = self._routes.get(chosen) or self._find_route(chosen)
        if rows == 0:
            return route.reader.empty()
        if self._inputs is not None:
            feeds = {name: feeds[name] for name in self._inputs}
        return route.reader.read(route.run(feeds), rows)

    def _find_route(self, chosen: tuple[str, ...]) -> _Route:
        session = ask_for(chosen, self._session, tuple(self._tasks))
        route = _Route(session, [self._tasks[name] for name in chosen], self._provider)
        if len(self._routes) < _ROUTES_KEPT:
            self._routes[chosen] = route
        return route

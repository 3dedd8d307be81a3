"""Runs the graphs of one plan: feeds in, a Prediction per task out.

Which graphs run for a choice of tasks, and where their outputs are, is worked out the first time that choice
is asked for: at one row, a call's own Python has to stay within a few µs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from te_runtime.answers import AnswerReader, TaskReader
from te_runtime.bundle import Bundle
from te_runtime.interfaces import BATCH_AXIS
from te_runtime.manifest import GraphSpec, TaskSpec, Variant
from te_runtime.plan import Mode, own_graph
from te_runtime.prediction import Prediction
from te_runtime.providers import Provider
from te_runtime.row_parts import RowPart, pick_parts
from te_runtime.session import open_session
from te_runtime.side_by_side import side_by_side

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from te_runtime.session_types import Session

__all__ = ["Answerer", "Executor", "SessionExecutor", "TaskReader", "open_executor"]

_ROUTES_KEPT = 256  # choices of tasks; a caller that asks for more of them pays some µs again


class Executor(Protocol):
    """Loaded graphs that answer any subset of the tasks. Any number of threads may call run at once."""

    def run(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, tasks: Sequence[str]
    ) -> dict[str, Prediction]:
        """Predict `tasks` for one batch.

        Args:
            feeds: the model's inputs by name, as InputReader gives them.
            rows: B, the number of rows in them; no graph runs for none.
            tasks: names of tasks, each of them known.

        Returns:
            A Prediction per task, in the order of `tasks`.

        Raises:
            BundleError: a graph failed while it ran, or gave another shape than the manifest promises.
        """

    def run_parts(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, parts: Sequence[RowPart]
    ) -> list[Prediction]:
        """Predict different tasks for different rows of one batch.

        Args:
            feeds: as for run.
            rows: B, at least one.
            parts: each task once, with the rows that it is wanted for.

        Returns:
            For each part a Prediction for its rows.

        Raises:
            BundleError: as run.
        """


class Answerer(NamedTuple):
    """A task and the loaded graph that answers it; tasks may share a graph."""

    task: TaskSpec
    session: Session


class _Route:
    """What runs for one choice of tasks.

    Attributes:
        steps: for each graph after the trunk, its session's run, and the names it reads or None where they
            are all that there is to read.
        reader: finds the answers among the outputs of the steps, one after the other.
    """

    __slots__ = ("reader", "steps")

    def __init__(self, answerers: Sequence[Answerer], offered: Sequence[str], provider: Provider) -> None:
        sessions = list({id(answerer.session): answerer.session for answerer in answerers}.values())
        numbers = {id(session): number for number, session in enumerate(sessions)}
        self.steps = [(session.run, _names_unless(session.spec, offered)) for session in sessions]
        sources = [(numbers[id(answerer.session)], answerer.task) for answerer in answerers]
        self.reader = AnswerReader([session.spec for session in sessions], sources, provider)


class SessionExecutor:
    """The trunk, if there is one, once per call, then the graphs of the tasks asked for, each once."""

    __slots__ = (
        "_answerers",
        "_cuts_rows",
        "_offered",
        "_provider",
        "_readers",
        "_routes",
        "_trunk",
        "_trunk_inputs",
        "_trunk_outputs",
    )

    def __init__(
        self,
        trunk: Session | None,
        answerers: Sequence[Answerer],
        *,
        model_inputs: Sequence[str],
        provider: Provider,
    ) -> None:
        """Wrap loaded graphs.

        Args:
            trunk: its outputs are what the tails read; None where graphs read the model's inputs alone.
            answerers: one per task.
            model_inputs: names of the model's inputs.
            provider: where the graphs run.
        """
        self._answerers = {answerer.task.name: answerer for answerer in answerers}
        self._trunk = trunk
        self._provider = provider
        self._trunk_inputs = None if trunk is None else _names_unless(trunk.spec, model_inputs)
        self._trunk_outputs = () if trunk is None else tuple(spec.name for spec in trunk.spec.outputs)
        self._offered = tuple(model_inputs) if trunk is None else self._trunk_outputs
        self._routes: dict[tuple[str, ...], _Route] = {}
        made = () if trunk is None else trunk.spec.outputs
        self._cuts_rows = not any(BATCH_AXIS in spec.shape[1:] for spec in made)
        self._readers = {
            answerer.task.name: TaskReader(answerer.session.spec, answerer.task, provider)
            for answerer in answerers
        }

    def run(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, tasks: Sequence[str]
    ) -> dict[str, Prediction]:
        """As Executor.run."""
        route = self._routes.get(tuple(tasks)) or self._find_route(tuple(tasks))
        if rows == 0:
            return route.reader.empty()
        values = feeds
        if self._trunk is not None:
            made = self._trunk.run(_only(feeds, self._trunk_inputs))
            values = dict(zip(self._trunk_outputs, made, strict=True))
        outputs: list[NDArray[np.generic]] = []
        for run, names in route.steps:
            outputs += run(values if names is None else _only({**feeds, **values}, names))
        return route.reader.read(outputs, rows)

    def run_parts(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, parts: Sequence[RowPart]
    ) -> list[Prediction]:
        """As Executor.run_parts: the trunk once for every row, each tail for its own rows."""
        answerers = [self._answerers[part.task] for part in parts]
        if not self._cuts_rows or len({id(answerer.session) for answerer in answerers}) < len(answerers):
            return pick_parts(self.run(feeds, rows, [part.task for part in parts]), parts)
        values = feeds
        if self._trunk is not None:
            made = self._trunk.run(_only(feeds, self._trunk_inputs))
            values = {**feeds, **dict(zip(self._trunk_outputs, made, strict=True))}
        return [self._run_part(part, values) for part in parts]

    def _run_part(self, part: RowPart, values: Mapping[str, NDArray[np.generic]]) -> Prediction:
        session = self._answerers[part.task].session
        own = {
            spec.name: values[spec.name]
            if part.rows is None or spec.shape[:1] != (BATCH_AXIS,)
            else values[spec.name][part.rows]
            for spec in session.spec.inputs
        }
        return self._readers[part.task].read(session.run(own), part.size)

    def _find_route(self, tasks: tuple[str, ...]) -> _Route:
        route = _Route([self._answerers[task] for task in tasks], self._offered, self._provider)
        if len(self._routes) < _ROUTES_KEPT:
            self._routes[tasks] = route
        return route


def open_executor(
    bundle: Bundle,
    variant: Variant,
    mode: Mode,
    *,
    provider: Provider,
    threads: int,
    spinning: bool = False,
) -> Executor:
    """Load the graphs of one mode.

    A tail is small beside the trunk and runs on the calling thread alone: fifty tails with threads of their
    own would keep hundreds of threads waiting.

    Raises:
        BundleError, ProviderError: as open_session.
    """

    def opening(spec: GraphSpec, graph_threads: int = threads) -> Callable[[], Session]:
        path = bundle.path(spec.path)
        return lambda: open_session(path, spec, provider=provider, threads=graph_threads, spinning=spinning)

    names = [spec.name for spec in bundle.manifest.inputs]
    tasks = bundle.manifest.tasks
    if mode == "joint":
        joint = opening(variant.joint)()
        answerers = [Answerer(task, joint) for task in tasks]
        return SessionExecutor(None, answerers, model_inputs=names, provider=provider)
    if mode in ("task", "pruned"):
        sessions = side_by_side([opening(own_graph(own, mode)) for own in variant.tasks])
        answerers = list(map(Answerer, tasks, sessions))
        return SessionExecutor(None, answerers, model_inputs=names, provider=provider)
    if variant.trunk is None:
        own_graphs = side_by_side([opening(own.tail) for own in variant.tasks])
        answerers = list(map(Answerer, tasks, own_graphs))
        return SessionExecutor(None, answerers, model_inputs=names, provider=provider)
    trunk, *tails = side_by_side([opening(variant.trunk), *(opening(own.tail, 1) for own in variant.tasks)])
    answerers = list(map(Answerer, tasks, tails))
    return SessionExecutor(trunk, answerers, model_inputs=names, provider=provider)


def _names_unless(graph: GraphSpec, offered: Sequence[str]) -> tuple[str, ...] | None:
    """The names that a graph reads, or None where they are exactly those offered."""
    names = tuple(spec.name for spec in graph.inputs)
    return None if set(names) == set(offered) else names


def _only(
    values: Mapping[str, NDArray[np.generic]], names: tuple[str, ...] | None
) -> Mapping[str, NDArray[np.generic]]:
    """The values that a graph reads; ONNX Runtime refuses any other."""
    return values if names is None else {name: values[name] for name in names}

"""Runs the graphs of one plan: feeds in, a Prediction per task out.

Which graphs run for a choice of tasks, and where their outputs are, is worked out the first time that choice
is asked for, and graphs that nothing needed before are loaded then: at one row, a call's own Python has to stay
within a few µs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from te_runtime.answers import AnswerReader, TaskReader
from te_runtime.bundle import Bundle
from te_runtime.deferred_session import DeferredSession, load_all
from te_runtime.file_marks import FileMarks
from te_runtime.interfaces import BATCH_AXIS, variant_graphs
from te_runtime.manifest import GraphSpec, TaskSpec, Variant
from te_runtime.onnxruntime_install import import_onnxruntime
from te_runtime.plan import Mode, own_graph, takes_joint_tails
from te_runtime.prediction import Prediction
from te_runtime.providers import Provider
from te_runtime.row_parts import RowPart, pick_parts
from te_runtime.session import OrtSession, open_session
from te_runtime.task_mode import TaskModeExecutor

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
            BundleError: a graph cannot be loaded, failed while it ran, or gave another shape than the manifest
                promises.
            ProviderError: the provider does not run every node of a graph.
        """

    def prepare(self, tasks: Sequence[str]) -> None:
        """Load what `run` needs for `tasks`.

        Raises:
            BundleError, ProviderError: as run.
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
    """A task and the graph that answers it; tasks may share a graph."""

    task: TaskSpec
    session: Session | DeferredSession[OrtSession]


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
        self.steps = [(session.run, _names_unless(session.spec, offered)) for session in _loaded(sessions)]
        sources = [(numbers[id(answerer.session)], answerer.task) for answerer in answerers]
        self.reader = AnswerReader([session.spec for session in sessions], sources, provider)


class SessionExecutor:
    """The trunk, if there is one, once per call, then the graphs of the tasks asked for, each once, or the joint
    tails for all of them.
    """

    __slots__ = (
        "_answerers",
        "_cuts_rows",
        "_joint_tails",
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
        joint_tails: Session | DeferredSession[OrtSession] | None = None,
    ) -> None:
        """Wrap graphs.

        Args:
            trunk: its outputs are what the tails read; None where graphs read the model's inputs alone.
            answerers: one per task.
            model_inputs: names of the model's inputs.
            provider: where the graphs run.
            joint_tails: answers every task, and runs instead of tails where plan.takes_joint_tails says so.
        """
        self._joint_tails = joint_tails
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
        shared = len({id(answerer.session) for answerer in answerers}) < len(answerers)
        asked = sum(part.size for part in parts)
        joint = self._joint_tails_for(asked, of=rows * len(self._answerers))
        if shared or joint is not None or not self._cuts_rows:
            return pick_parts(self.run(feeds, rows, [part.task for part in parts]), parts)
        values = feeds
        if self._trunk is not None:
            made = self._trunk.run(_only(feeds, self._trunk_inputs))
            values = {**feeds, **dict(zip(self._trunk_outputs, made, strict=True))}
        sessions = _loaded([answerer.session for answerer in answerers])
        return [self._run_part(session, part, values) for session, part in zip(sessions, parts, strict=True)]

    def _run_part(
        self, session: Session, part: RowPart, values: Mapping[str, NDArray[np.generic]]
    ) -> Prediction:
        own = {
            spec.name: values[spec.name]
            if part.rows is None or spec.shape[:1] != (BATCH_AXIS,)
            else values[spec.name][part.rows]
            for spec in session.spec.inputs
        }
        return self._readers[part.task].read(session.run(own), part.size)

    def prepare(self, tasks: Sequence[str]) -> None:
        """As Executor.prepare."""
        self._find_route(tuple(tasks))

    def _find_route(self, tasks: tuple[str, ...]) -> _Route:
        answerers = [self._answerers[task] for task in tasks]
        joint = self._joint_tails_for(len(tasks), of=len(self._answerers))
        if joint is not None:
            answerers = [Answerer(answerer.task, joint) for answerer in answerers]
        route = _Route(answerers, self._offered, self._provider)
        if len(self._routes) < _ROUTES_KEPT:
            self._routes[tasks] = route
        return route

    def _joint_tails_for(self, asked: int, *, of: int) -> Session | DeferredSession[OrtSession] | None:
        return self._joint_tails if takes_joint_tails(asked, of=of) else None


def open_executor(
    bundle: Bundle,
    variant: Variant,
    mode: Mode,
    *,
    provider: Provider,
    threads: int,
    spinning: bool = False,
) -> Executor:
    """Load what every call of one mode needs, the trunk or the joint graph; the others wait until they are needed.

    A tail is small beside the trunk and runs on the calling thread alone: fifty tails with threads of their
    own would keep hundreds of threads waiting.

    Raises:
        BundleError, ProviderError: as open_session.
    """
    import_onnxruntime()  # who lacks it hears of it now, whatever waits
    marks = FileMarks(bundle, [variant.weights, *(graph.path for graph in variant_graphs(variant))])

    def opened(spec: GraphSpec, graph_threads: int = threads) -> OrtSession:
        path = bundle.path(spec.path)
        return open_session(path, spec, provider=provider, threads=graph_threads, spinning=spinning)

    def deferred(spec: GraphSpec, graph_threads: int = threads) -> DeferredSession[OrtSession]:
        def load() -> OrtSession:
            marks.require_unchanged(spec.path, variant.weights)
            return opened(spec, graph_threads)

        return DeferredSession(spec, load)

    names = [spec.name for spec in bundle.manifest.inputs]
    tasks = bundle.manifest.tasks

    def own_graphs() -> SessionExecutor:
        answerers = list(map(Answerer, tasks, (deferred(own_graph(own, mode)) for own in variant.tasks)))
        return SessionExecutor(None, answerers, model_inputs=names, provider=provider)

    def trunk_and_tails(spec: GraphSpec, joint_tails: GraphSpec | None) -> SessionExecutor:
        return SessionExecutor(
            deferred(spec).get(),
            list(map(Answerer, tasks, (deferred(own.tail, 1) for own in variant.tasks))),
            model_inputs=names,
            provider=provider,
            joint_tails=None if joint_tails is None else deferred(joint_tails),
        )

    trunk = variant.trunk
    if mode == "joint":
        joint = opened(variant.joint)
        return SessionExecutor(
            None, [Answerer(task, joint) for task in tasks], model_inputs=names, provider=provider
        )
    if trunk is None or mode == "pruned":
        return own_graphs()
    if mode == "split":
        return trunk_and_tails(trunk, variant.joint_tails)
    return TaskModeExecutor(own_graphs, lambda: trunk_and_tails(trunk, None))


def _loaded(sessions: Sequence[Session | DeferredSession[OrtSession]]) -> list[Session]:
    load_all([session for session in sessions if isinstance(session, DeferredSession)])
    return [session.get() if isinstance(session, DeferredSession) else session for session in sessions]


def _names_unless(graph: GraphSpec, offered: Sequence[str]) -> tuple[str, ...] | None:
    """The names that a graph reads, or None where they are exactly those offered."""
    names = tuple(spec.name for spec in graph.inputs)
    return None if set(names) == set(offered) else names


def _only(
    values: Mapping[str, NDArray[np.generic]], names: tuple[str, ...] | None
) -> Mapping[str, NDArray[np.generic]]:
    """The values that a graph reads; ONNX Runtime refuses any other."""
    return values if names is None else {name: values[name] for name in names}

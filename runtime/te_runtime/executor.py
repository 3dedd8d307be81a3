"""Runs the graphs of one plan: feeds in, a Prediction per task out.

Everything that can be known before a call is worked out when an executor is made: at one row, a call's own
Python must stay below 8 µs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from te_runtime.bundle import Bundle
from te_runtime.errors import BundleError
from te_runtime.inputs import shown_shape
from te_runtime.interfaces import output_positions
from te_runtime.manifest import GraphSpec, TaskSpec, TensorSpec, Variant
from te_runtime.plan import Mode
from te_runtime.prediction import Prediction
from te_runtime.providers import Provider
from te_runtime.session import Session, open_session

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Executor",
    "JointExecutor",
    "SplitExecutor",
    "Tail",
    "TaskExecutor",
    "TaskReader",
    "open_executor",
]


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


class TaskReader:
    """Finds one task's prediction among the outputs of one graph."""

    __slots__ = ("_axes", "_path", "_prediction", "_task", "_weights", "_weights_axes")

    def __init__(self, graph: GraphSpec, task: TaskSpec) -> None:
        """Work out where `graph` gives what `task` promises.

        Raises:
            BundleError: it does not.
        """
        self._path = graph.path
        self._task = task
        self._prediction, self._weights = output_positions(graph, task)
        self._axes = task.prediction.shape[1:]
        self._weights_axes = task.routing_weights.shape[1:] if task.routing_weights else ()

    def read(self, outputs: Sequence[NDArray[np.generic]], rows: int) -> Prediction:
        """Take the task's arrays out of a graph's outputs for `rows` rows.

        Raises:
            BundleError: the graph gave another shape than the manifest promises.
        """
        output = outputs[self._prediction]
        if output.shape != (rows, *self._axes):
            raise self._misfit(output, self._task.prediction, rows)
        if self._weights is None:
            return Prediction(output, None)
        weights = outputs[self._weights]
        if weights.shape != (rows, *self._weights_axes):
            raise self._misfit(weights, self._task.routing_weights or self._task.prediction, rows)
        return Prediction(output, weights)

    def empty(self) -> Prediction:
        """The answer for no rows."""
        weights = self._task.routing_weights
        return Prediction(_empty(self._task.prediction), None if weights is None else _empty(weights))

    def _misfit(self, found: NDArray[np.generic], spec: TensorSpec, rows: int) -> BundleError:
        return BundleError(
            f"{self._path}: gave {spec.name!r} of task {self._task.name!r} for {rows} rows with shape "
            f"{shown_shape(found.shape)}, the manifest promises {shown_shape(spec.shape)}. "
            "Export the model again."
        )


class JointExecutor:
    """The joint graph: one run computes every task, whatever is asked for."""

    __slots__ = ("_inputs", "_readers", "_session")

    def __init__(self, session: Session, readers: Mapping[str, TaskReader]) -> None:
        self._session = session
        self._readers = readers
        self._inputs = tuple(spec.name for spec in session.spec.inputs)

    def run(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, tasks: Sequence[str]
    ) -> dict[str, Prediction]:
        """As Executor.run."""
        readers = self._readers
        if rows == 0:
            return {task: readers[task].empty() for task in tasks}
        outputs = self._session.run(_only(feeds, self._inputs))
        return {task: readers[task].read(outputs, rows) for task in tasks}


@dataclass(frozen=True, slots=True)
class Tail:
    """The graph that answers one task, loaded."""

    session: Session
    inputs: tuple[str, ...]
    reader: TaskReader

    @classmethod
    def of(cls, session: Session, task: TaskSpec) -> Tail:
        """The tail that `session` runs."""
        names = tuple(spec.name for spec in session.spec.inputs)
        return cls(session, names, TaskReader(session.spec, task))


class SplitExecutor:
    """The trunk once per call, then the tails asked for; the weights that tasks share are in memory once."""

    __slots__ = ("_inputs", "_outputs", "_tails", "_trunk")

    def __init__(self, trunk: Session, tails: Mapping[str, Tail]) -> None:
        self._trunk = trunk
        self._tails = tails
        self._inputs = tuple(spec.name for spec in trunk.spec.inputs)
        self._outputs = tuple(spec.name for spec in trunk.spec.outputs)

    def run(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, tasks: Sequence[str]
    ) -> dict[str, Prediction]:
        """As Executor.run."""
        tails = self._tails
        if rows == 0:
            return {task: tails[task].reader.empty() for task in tasks}
        outputs = self._trunk.run(_only(feeds, self._inputs))
        made = dict(zip(self._outputs, outputs, strict=True))
        predictions = {}
        for task in tasks:
            tail = tails[task]
            if tail.inputs == self._outputs:
                outputs = tail.session.run(made)
            else:
                outputs = tail.session.run(_only({**feeds, **made}, tail.inputs))
            predictions[task] = tail.reader.read(outputs, rows)
        return predictions


class TaskExecutor:
    """A whole graph per task, each with weights of its own."""

    __slots__ = ("_graphs",)

    def __init__(self, graphs: Mapping[str, Tail]) -> None:
        self._graphs = graphs

    def run(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, tasks: Sequence[str]
    ) -> dict[str, Prediction]:
        """As Executor.run."""
        predictions = {}
        for task in tasks:
            graph = self._graphs[task]
            if rows == 0:
                predictions[task] = graph.reader.empty()
                continue
            outputs = graph.session.run(_only(feeds, graph.inputs))
            predictions[task] = graph.reader.read(outputs, rows)
        return predictions


def open_executor(
    bundle: Bundle, variant: Variant, mode: Mode, *, provider: Provider, threads: int
) -> Executor:
    """Load the graphs of one mode.

    A tail is small beside the trunk and runs on the calling thread alone: fifty tails with threads of their
    own would keep hundreds of threads waiting.

    Raises:
        BundleError, ProviderError: as open_session.
    """

    def opened(spec: GraphSpec, graph_threads: int = threads) -> Session:
        return open_session(bundle.path(spec.path), spec, provider=provider, threads=graph_threads)

    tasks = bundle.manifest.tasks
    if mode == "joint":
        readers = {task.name: TaskReader(variant.joint, task) for task in tasks}
        return JointExecutor(opened(variant.joint), readers)
    graphs = dict(zip(tasks, variant.tasks, strict=True))
    if mode == "task":
        return TaskExecutor({task.name: Tail.of(opened(own.graph), task) for task, own in graphs.items()})
    trunk = opened(variant.trunk)
    return SplitExecutor(trunk, {t.name: Tail.of(opened(own.tail, 1), t) for t, own in graphs.items()})


def _only(
    values: Mapping[str, NDArray[np.generic]], names: tuple[str, ...]
) -> Mapping[str, NDArray[np.generic]]:
    """The values that a graph reads; ONNX Runtime refuses any other."""
    if len(values) == len(names):
        return values
    return {name: values[name] for name in names}


def _empty(spec: TensorSpec) -> NDArray[np.generic]:
    return np.zeros((0, *(axis for axis in spec.shape[1:] if isinstance(axis, int))), dtype=spec.dtype)

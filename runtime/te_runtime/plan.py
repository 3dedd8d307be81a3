"""How a prediction is computed: the trunk once, then the tail of each task that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from te_runtime.bundle import Bundle
from te_runtime.errors import BundleError
from te_runtime.inputs import shown_shape
from te_runtime.interfaces import output_positions
from te_runtime.manifest import GraphSpec, TaskSpec, TensorSpec, Variant
from te_runtime.prediction import Prediction
from te_runtime.providers import Provider
from te_runtime.session import Session, open_session

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TaskReader", "TrunkPlan", "open_plan"]


@dataclass(frozen=True, slots=True)
class TaskReader:
    """Finds one task's prediction among the outputs of one graph.

    Attributes:
        path: the graph, for errors.
        task: the task.
        prediction: position of the prediction among the graph's outputs.
        routing_weights: position of the routing weights, or None where the task has no gate.
    """

    path: str
    task: TaskSpec
    prediction: int
    routing_weights: int | None

    @classmethod
    def of(cls, graph: GraphSpec, task: TaskSpec) -> TaskReader:
        """The reader of `task` in `graph`."""
        return cls(graph.path, task, *output_positions(graph, task))

    def read(self, outputs: Sequence[NDArray[np.generic]], rows: int) -> Prediction:
        """Take the task's arrays out of a graph's outputs for `rows` rows.

        Raises:
            BundleError: the graph gave another shape than the manifest promises.
        """
        output = self._checked(outputs[self.prediction], self.task.prediction, rows)
        if self.routing_weights is None or self.task.routing_weights is None:
            return Prediction(output, None)
        weights = self._checked(outputs[self.routing_weights], self.task.routing_weights, rows)
        return Prediction(output, weights)

    def empty(self) -> Prediction:
        """The answer for no rows."""
        weights = self.task.routing_weights
        return Prediction(_empty(self.task.prediction), None if weights is None else _empty(weights))

    def _checked(self, found: NDArray[np.generic], spec: TensorSpec, rows: int) -> NDArray[np.generic]:
        if found.shape != (rows, *spec.shape[1:]):
            raise BundleError(
                f"{self.path}: gave {spec.name!r} of task {self.task.name!r} for {rows} rows with shape "
                f"{shown_shape(found.shape)}, the manifest promises {shown_shape(spec.shape)}. "
                "Export the model again."
            )
        return found


@dataclass(frozen=True, slots=True)
class Tail:
    """One task's tail, loaded."""

    session: Session
    inputs: tuple[str, ...]
    reader: TaskReader


class TrunkPlan:
    """The trunk and every tail, loaded; the weights that tasks share are in memory once."""

    __slots__ = ("_inputs", "_outputs", "_tails", "_trunk")

    def __init__(self, trunk: Session, tails: Mapping[str, Tail]) -> None:
        self._trunk = trunk
        self._tails = tails
        self._inputs = tuple(spec.name for spec in trunk.spec.inputs)
        self._outputs = tuple(spec.name for spec in trunk.spec.outputs)

    def run(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, tasks: Sequence[str]
    ) -> dict[str, Prediction]:
        """Predict `tasks` for one batch.

        Args:
            feeds: the model's inputs by name, as prepare_inputs gives them.
            rows: B, the number of rows in them; no graph runs for none.
            tasks: names of tasks, each of them known.

        Returns:
            A Prediction per task, in the order of `tasks`.

        Raises:
            BundleError: a graph failed while it ran.
        """
        if rows == 0:
            return {task: self._tails[task].reader.empty() for task in tasks}
        outputs = self._trunk.run({name: feeds[name] for name in self._inputs})
        values = {**feeds, **dict(zip(self._outputs, outputs, strict=True))}
        predictions = {}
        for task in tasks:
            tail = self._tails[task]
            outputs = tail.session.run({name: values[name] for name in tail.inputs})
            predictions[task] = tail.reader.read(outputs, rows)
        return predictions


def open_plan(bundle: Bundle, variant: Variant, *, provider: Provider, threads: int) -> TrunkPlan:
    """Load the trunk and the tails of one variant.

    A tail is small beside the trunk and runs on the calling thread alone: fifty tails with threads of their
    own would keep hundreds of threads waiting.

    Raises:
        BundleError, ProviderError: as open_session.
    """
    trunk = open_session(bundle.path(variant.trunk.path), variant.trunk, provider=provider, threads=threads)
    tails = {}
    for task, graphs in zip(bundle.manifest.tasks, variant.tasks, strict=True):
        spec = graphs.tail
        session = open_session(bundle.path(spec.path), spec, provider=provider, threads=1)
        inputs = tuple(value.name for value in spec.inputs)
        tails[task.name] = Tail(session, inputs, TaskReader.of(spec, task))
    return TrunkPlan(trunk, tails)


def _empty(spec: TensorSpec) -> NDArray[np.generic]:
    return np.zeros((0, *(axis for axis in spec.shape[1:] if isinstance(axis, int))), dtype=spec.dtype)

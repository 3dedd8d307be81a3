"""Takes predictions out of what graphs gave, after checking that the shapes are those promised.

At one row a call spends more on this than anywhere else outside ONNX Runtime, and all of it right after the
weights have swept the CPU's caches, where every line of Python costs thrice. So AnswerReader works out every
position and shape beforehand, and picks and packs with functions written in C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from te_runtime.errors import BundleError
from te_runtime.inputs import shown_shape
from te_runtime.interfaces import output_positions
from te_runtime.manifest import GraphSpec, TaskSpec, TensorSpec
from te_runtime.prediction import Prediction, make_predictions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from te_runtime.providers import Provider

__all__ = ["AnswerReader", "TaskReader"]

_SHAPE_OF = attrgetter("shape")


class AnswerReader:
    """Finds the predictions of several tasks among the outputs of the graphs that ran for them."""

    __slots__ = ("_gates", "_graphs", "_heads", "_names", "_provider", "_shapes", "_tasks")

    def __init__(
        self, graphs: Sequence[GraphSpec], sources: Sequence[tuple[int, TaskSpec]], provider: Provider
    ) -> None:
        """Work out where everything is.

        Args:
            graphs: the graphs that run; their outputs come one graph after the other.
            sources: for each task, in order: which of the graphs answers it, and the task.
            provider: where they run.

        Raises:
            BundleError: a graph does not give what its task promises.
        """
        self._graphs = tuple(graphs)
        self._tasks = tuple(task for _, task in sources)
        self._names = tuple(task.name for task in self._tasks)
        self._provider = provider
        heads: list[int] = []
        gates: list[int | None] = []
        for number, task in sources:
            start = sum(len(graph.outputs) for graph in graphs[:number])
            prediction, weights = output_positions(graphs[number], task)
            heads.append(start + prediction)
            gates.append(None if weights is None else start + weights)
        self._heads = _picker(heads)
        self._gates = _picker(gates)
        self._shapes = self._promised(0)

    def read(self, outputs: Sequence[NDArray[np.generic]], rows: int) -> dict[str, Prediction]:
        """Take the tasks' arrays out of the graphs' outputs for `rows` rows.

        Raises:
            BundleError: a graph gave another shape than the manifest promises.
        """
        shapes = self._shapes
        if shapes[0] != rows:
            shapes = self._shapes = self._promised(rows)  # one assignment, so threads may cross here
        if [*map(_SHAPE_OF, outputs)] != shapes[1]:
            raise self._misfit(outputs, rows)
        found = make_predictions(self._heads(outputs), self._gates(outputs), self._provider)
        return dict(zip(self._names, found, strict=True))

    def empty(self) -> dict[str, Prediction]:
        """The answers for no rows."""
        return {
            task.name: Prediction(
                _empty(task.prediction),
                None if task.routing_weights is None else _empty(task.routing_weights),
                self._provider,
            )
            for task in self._tasks
        }

    def _promised(self, rows: int) -> tuple[int, list[tuple[int | str, ...]]]:
        """`rows`, and the shape of every output for that many rows."""
        return rows, [(rows, *spec.shape[1:]) for graph in self._graphs for spec in graph.outputs]

    def _misfit(self, outputs: Sequence[NDArray[np.generic]], rows: int) -> BundleError:
        shapes = self._promised(rows)[1]
        places = enumerate(zip(outputs, shapes, strict=True))
        place = next(place for place, (array, shape) in places if array.shape != shape)
        graph, spec = [(graph, spec) for graph in self._graphs for spec in graph.outputs][place]
        numbers = range(len(outputs))
        owners = zip(self._names, self._heads(numbers), self._gates(numbers), strict=True)
        of_task = next((f" of task {task!r}" for task, *own in owners if place in own), "")
        return BundleError(
            f"{graph.path}: gave {spec.name!r}{of_task} for {rows} rows with shape "
            f"{shown_shape(outputs[place].shape)}, the manifest promises {shown_shape(spec.shape)}. "
            "Export the model again."
        )


class TaskReader:
    """Finds one task's prediction among the outputs of one graph."""

    __slots__ = ("_reader", "_task")

    def __init__(self, graph: GraphSpec, task: TaskSpec, provider: Provider) -> None:
        """Work out where `graph` gives what `task` promises.

        Raises:
            BundleError: it does not.
        """
        self._task = task.name
        self._reader = AnswerReader([graph], [(0, task)], provider)

    def read(self, outputs: Sequence[NDArray[np.generic]], rows: int) -> Prediction:
        """Take the task's arrays out of the graph's outputs for `rows` rows.

        Raises:
            BundleError: the graph gave another shape than the manifest promises.
        """
        return self._reader.read(outputs, rows)[self._task]

    def empty(self) -> Prediction:
        """The answer for no rows."""
        return self._reader.empty()[self._task]


def _picker(places: Sequence[int | None]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that picks the elements at `places`, with None for None."""
    if len(places) > 1 and None not in places:
        return itemgetter(*places)  # gives a tuple from two places on
    return lambda values: [None if place is None else values[place] for place in places]


def _empty(spec: TensorSpec) -> NDArray[np.generic]:
    return np.zeros((0, *(axis for axis in spec.shape[1:] if isinstance(axis, int))), dtype=spec.dtype)

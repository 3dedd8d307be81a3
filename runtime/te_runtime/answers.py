"""Takes predictions out of what graphs gave, after checking that the shapes are those promised.

At one row a call spends more on this than anywhere else outside ONNX Runtime, so AnswerReader works out every
position and shape beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from te_runtime.errors import BundleError
from te_runtime.inputs import shown_shape
from te_runtime.interfaces import output_positions
from te_runtime.manifest import GraphSpec, TaskSpec, TensorSpec
from te_runtime.prediction import Prediction

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["AnswerReader", "TaskReader"]


class AnswerReader:
    """Finds the predictions of several tasks among the outputs of the graphs that ran for them."""

    __slots__ = ("_gated", "_graphs", "_plain", "_shapes", "_tasks")

    def __init__(self, graphs: Sequence[GraphSpec], sources: Sequence[tuple[int, TaskSpec]]) -> None:
        """Work out where everything is.

        Args:
            graphs: the graphs that run; their outputs come one graph after the other.
            sources: for each task, in order: which of the graphs answers it, and the task.

        Raises:
            BundleError: a graph does not give what its task promises.
        """
        self._graphs = tuple(graphs)
        self._tasks = tuple(task for _, task in sources)
        self._gated: list[tuple[str, int, int]] = []
        self._plain: list[tuple[str, int]] = []
        for number, task in sources:
            start = sum(len(graph.outputs) for graph in graphs[:number])
            prediction, weights = output_positions(graphs[number], task)
            if weights is None:
                self._plain.append((task.name, start + prediction))
            else:
                self._gated.append((task.name, start + prediction, start + weights))
        self._shapes = self._promised(0)

    def read(self, outputs: Sequence[NDArray[np.generic]], rows: int) -> dict[str, Prediction]:
        """Take the tasks' arrays out of the graphs' outputs for `rows` rows.

        Raises:
            BundleError: a graph gave another shape than the manifest promises.
        """
        shapes = self._shapes
        if shapes[0] != rows:
            shapes = self._shapes = self._promised(rows)  # one assignment, so threads may cross here
        if [array.shape for array in outputs] != shapes[1]:
            raise self._misfit(outputs, rows)
        answers = {
            task: Prediction(outputs[prediction], outputs[weights])
            for task, prediction, weights in self._gated
        }
        if self._plain:
            answers |= {task: Prediction(outputs[prediction], None) for task, prediction in self._plain}
            return {task.name: answers[task.name] for task in self._tasks}
        return answers

    def empty(self) -> dict[str, Prediction]:
        """The answers for no rows."""
        return {
            task.name: Prediction(
                _empty(task.prediction),
                None if task.routing_weights is None else _empty(task.routing_weights),
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
        of_task = next(
            (f" of task {task!r}" for task, *own in (*self._gated, *self._plain) if place in own), ""
        )
        return BundleError(
            f"{graph.path}: gave {spec.name!r}{of_task} for {rows} rows with shape "
            f"{shown_shape(outputs[place].shape)}, the manifest promises {shown_shape(spec.shape)}. "
            "Export the model again."
        )


class TaskReader:
    """Finds one task's prediction among the outputs of one graph."""

    __slots__ = ("_reader", "_task")

    def __init__(self, graph: GraphSpec, task: TaskSpec) -> None:
        """Work out where `graph` gives what `task` promises.

        Raises:
            BundleError: it does not.
        """
        self._task = task.name
        self._reader = AnswerReader([graph], [(0, task)])

    def read(self, outputs: Sequence[NDArray[np.generic]], rows: int) -> Prediction:
        """Take the task's arrays out of the graph's outputs for `rows` rows.

        Raises:
            BundleError: the graph gave another shape than the manifest promises.
        """
        return self._reader.read(outputs, rows)[self._task]

    def empty(self) -> Prediction:
        """The answer for no rows."""
        return self._reader.empty()[self._task]


def _empty(spec: TensorSpec) -> NDArray[np.generic]:
    return np.zeros((0, *(axis for axis in spec.shape[1:] if isinstance(axis, int))), dtype=spec.dtype)

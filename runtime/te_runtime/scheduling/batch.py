"""Requests that run together: their rows side by side, and the answers taken apart again.

Requests for the same tasks stand next to each other, so that a tail's rows are as a rule one slice of the trunk's
outputs, which needs no copy.

Rows are kept as bytes and joined as bytes: numpy lets go of Python's lock for each array that it copies, and where
callers keep the lock busy a batch of 64 rows would wait for it 64 times, 5 ms each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from te_runtime.prediction import Prediction, make_predictions
from te_runtime.row_parts import RowPart, Rows
from te_runtime.scheduling.request import Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Batch", "InputLayout", "PackedRows", "pack_rows", "take_answers"]

_TASKS_OF = attrgetter("tasks")


class InputLayout(NamedTuple):
    """An input of the model: its name, and the dtype of its arrays."""

    name: str
    dtype: np.dtype[np.generic]


@dataclass(slots=True, eq=False)
class Batch:
    """Requests on their way through an executor.

    Attributes:
        requests: what runs, at least one.
        tasks: every task that one of them asks for.
        rows: of all of them.
        started_ns: when it was handed to the executor.
        expected_ns: how long it was expected to take.
        was_given_up: it took too long; what still comes of it is ignored.
    """

    requests: list[Request]
    tasks: frozenset[str]
    rows: int
    started_ns: int
    expected_ns: float
    was_given_up: bool = False


class PackedRows(NamedTuple):
    """The rows of a batch.

    Attributes:
        requests: in the order of their rows.
        feeds: input name → array (rows, …), not to be written to.
        rows: how many.
        parts: for each task, which rows it is wanted for.
        sizes: for each task, in the order of `requests`: how many rows each of those that ask for it has.
    """

    requests: list[Request]
    feeds: dict[str, NDArray[np.generic]]
    rows: int
    parts: tuple[RowPart, ...]
    sizes: dict[str, list[int]]


def pack_rows(requests: Sequence[Request], inputs: Sequence[InputLayout]) -> PackedRows:
    """Put the rows of requests side by side.

    Args:
        requests: at least one, all with the same row_shapes.
        inputs: of the model, in the order of Request.data.
    """
    if len(requests) == 1:
        return _pack_one(requests[0], inputs)
    ordered = sorted(requests, key=_TASKS_OF)
    spans: dict[str, list[tuple[int, int]]] = {}
    sizes: dict[str, list[int]] = {}
    row = 0
    for request in ordered:
        end = row + request.rows
        for task in request.tasks:
            if task not in spans:
                spans[task], sizes[task] = [], []
            own = spans[task]
            if own and own[-1][1] == row:
                own[-1] = (own[-1][0], end)
            else:
                own.append((row, end))
            sizes[task].append(request.rows)
        row = end
    feeds: dict[str, NDArray[np.generic]] = {}
    for number, (name, dtype) in enumerate(inputs):
        data = b"".join([request.data[number] for request in ordered])
        feeds[name] = np.frombuffer(data, dtype).reshape(row, *ordered[0].row_shapes[number])
    parts = tuple(RowPart(task, _rows(own, row), sum(sizes[task])) for task, own in spans.items())
    return PackedRows(ordered, feeds, row, parts, sizes)


def _pack_one(request: Request, inputs: Sequence[InputLayout]) -> PackedRows:
    """A lonely request's rows lie side by side as they are, and each of its tasks wants them all."""
    feeds: dict[str, NDArray[np.generic]] = {
        name: np.frombuffer(data, dtype).reshape(request.rows, *shape)
        for (name, dtype), data, shape in zip(inputs, request.data, request.row_shapes, strict=True)
    }
    parts = tuple([RowPart(task, None, request.rows) for task in request.tasks])
    return PackedRows([request], feeds, request.rows, parts, {task: [request.rows] for task in request.tasks})


def take_answers(packed: PackedRows, answers: Sequence[Prediction]) -> list[Any]:
    """For each of `packed.requests`, what its future gives: a Prediction, or a dict of them by task.

    Args:
        answers: for each of `packed.parts`, the task's predictions for its rows.
    """
    if len(packed.requests) == 1:
        request = packed.requests[0]
        return [answers[0] if request.is_single else dict(zip(request.tasks, answers, strict=True))]
    own = {
        part.task: _taken_apart(answer, packed.sizes[part.task])
        for part, answer in zip(packed.parts, answers, strict=True)
    }
    return [
        next(own[request.tasks[0]])
        if request.is_single
        else {task: next(own[task]) for task in request.tasks}
        for request in packed.requests
    ]


def _taken_apart(answer: Prediction, sizes: Sequence[int]) -> Iterator[Prediction]:
    """The rows of one request after the other."""
    output, weights, provider = answer
    if len(output) == len(sizes):  # one row each, and walking along an axis takes half as long as slicing
        own_weights = repeat(None) if weights is None else weights[:, None]
        yield from make_predictions(output[:, None], own_weights, provider)
        return
    stop = 0
    for size in sizes:
        start, stop = stop, stop + size
        yield Prediction(output[start:stop], None if weights is None else weights[start:stop], provider)


def _rows(spans: Sequence[tuple[int, int]], rows: int) -> Rows:
    if len(spans) == 1:
        start, stop = spans[0]
        return None if (start, stop) == (0, rows) else slice(start, stop)
    return np.concatenate([np.arange(start, stop, dtype=np.intp) for start, stop in spans])

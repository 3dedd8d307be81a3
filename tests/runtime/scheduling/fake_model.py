"""A model without graphs: task t answers row r with (t's number, r's value), as slowly and as badly as a test asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from te_runtime.inputs import InputReader
from te_runtime.manifest import TensorSpec
from te_runtime.prediction import Prediction
from te_runtime.row_parts import RowPart

POISON = -666.0


class FakeModel:
    """What Scheduler uses of te_runtime.Model.

    Attributes:
        entered: set while a batch runs.
        gate: cleared by a test, batches wait until it is set again.
        batches: for each batch that began, its parts' sizes by task.
        fails: raises for a batch's rows, or not.
    """

    provider = "cpu"
    threads = 1
    max_batch: int | None = None

    def __init__(self, tasks: Sequence[str] = ("a", "b", "c"), *, name: str = "fake") -> None:
        self.name = name
        self.tasks = tuple(tasks)
        self.inputs = (TensorSpec("x", "float32", ("batch", 2)),)
        self.input_reader = InputReader(self.inputs)
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[dict[str, int]] = []
        self.delay_s = 0.0
        self.fails: Callable[[NDArray[np.generic]], None] = lambda rows: None

    def example_rows(self) -> dict[str, NDArray[np.generic]]:
        return {"x": np.zeros((3, 2), dtype=np.float32)}

    def predict(
        self, x: Mapping[str, NDArray[np.generic]], tasks: Sequence[str] | None = None
    ) -> dict[str, Prediction]:
        return {task: self._answer(task, x["x"]) for task in tasks or self.tasks}

    def predict_parts(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, parts: Sequence[RowPart]
    ) -> list[Prediction]:
        x = feeds["x"]
        assert len(x) == rows
        self.batches.append({part.task: part.size for part in parts})
        self.entered.set()
        try:
            assert self.gate.wait(30)
            if self.delay_s:
                time.sleep(self.delay_s)
            self.fails(x)
            if (x == POISON).any():
                raise ArithmeticError("poisoned")
            return [self._answer(part.task, x if part.rows is None else x[part.rows]) for part in parts]
        finally:
            self.entered.clear()

    def _answer(self, task: str, x: NDArray[np.generic]) -> Prediction:
        numbers = np.full(len(x), self.tasks.index(task), dtype=np.float32)
        return Prediction(np.stack([numbers, x[:, 0]], axis=1), None, "cpu")

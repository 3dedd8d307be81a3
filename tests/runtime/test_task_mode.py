from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from te_runtime.errors import BundleError
from te_runtime.prediction import Prediction
from te_runtime.row_parts import RowPart
from te_runtime.task_mode import TaskModeExecutor

ROWS = np.zeros((2, 3), dtype=np.float32)


class FakeExecutor:
    """Keeps what it was asked for."""

    def __init__(self, name: str, asked: list[tuple[str, ...]]) -> None:
        self._name = name
        self._asked = asked

    def run(self, feeds: Mapping[str, np.ndarray], rows: int, tasks: Sequence[str]) -> dict[str, Prediction]:
        self._asked.append((self._name, *tasks))
        return {task: Prediction(feeds["x"], None, "cpu") for task in tasks}

    def run_parts(
        self, feeds: Mapping[str, np.ndarray], rows: int, parts: Sequence[RowPart]
    ) -> list[Prediction]:
        return list(self.run(feeds, rows, [part.task for part in parts]).values())

    def prepare(self, tasks: Sequence[str]) -> None:
        self._asked.append((self._name, "prepare", *tasks))


class Opened:
    """A TaskModeExecutor over fakes, with what was opened and asked for."""

    def __init__(self, together: Callable[[], None] = lambda: None) -> None:
        self.opened: list[str] = []
        self.asked: list[tuple[str, ...]] = []
        self._before_together = together
        self.executor = TaskModeExecutor(self._open_alone, self._open_together)

    def _open_alone(self) -> FakeExecutor:
        self.opened.append("alone")
        return FakeExecutor("alone", self.asked)

    def _open_together(self) -> FakeExecutor:
        self.opened.append("together")
        self._before_together()
        return FakeExecutor("together", self.asked)

    def run(self, *tasks: str) -> None:
        assert list(self.executor.run({"x": ROWS}, 2, tasks)) == list(tasks)


def test_nothing_is_opened_before_it_is_asked_for() -> None:
    assert Opened().opened == []


def test_the_only_task_has_its_own_graph_until_another_is_asked_for() -> None:
    made = Opened()
    made.run("a")
    made.run("a")
    assert (made.opened, made.asked) == (["alone"], [("alone", "a")] * 2)
    made.run("b")
    made.run("a")
    made.run("a", "b")
    assert made.opened == ["alone", "together"]
    assert made.asked[2:] == [("together", "b"), ("together", "a"), ("together", "a", "b")]


def test_several_tasks_at_once_never_open_a_graph_of_their_own() -> None:
    made = Opened()
    made.executor.prepare(["a", "b"])
    made.run("a")
    assert made.opened == ["together"]
    assert made.asked == [("together", "prepare", "a", "b"), ("together", "a")]


def test_preparing_a_second_task_is_asking_for_it() -> None:
    made = Opened()
    made.executor.prepare(["a"])
    made.executor.prepare(["b"])
    assert made.asked == [("alone", "prepare", "a"), ("together", "prepare", "b")]


def test_parts_of_a_batch_count_by_their_tasks() -> None:
    made = Opened()
    one, two = RowPart("a", slice(0, 1), 1), RowPart("b", slice(1, 2), 1)
    assert len(made.executor.run_parts({"x": ROWS}, 2, [one])) == 1
    assert len(made.executor.run_parts({"x": ROWS}, 2, [one, two])) == 2
    assert made.asked == [("alone", "a"), ("together", "a", "b")]


def test_what_cannot_be_opened_leaves_the_first_task_its_graph() -> None:
    fails = [True]

    def fail_once() -> None:
        if fails.pop():
            raise BundleError("fp32/trunk.onnx: was changed")

    fails[:] = [False, True]
    made = Opened(fail_once)
    made.run("a")
    with pytest.raises(BundleError, match="was changed"):
        made.run("b")
    made.run("a")
    made.run("b")
    assert made.opened == ["alone", "together", "together"]
    assert made.asked == [("alone", "a"), ("alone", "a"), ("together", "b")]


def test_threads_that_ask_at_once_open_each_graph_once() -> None:
    for _ in range(20):
        made, ready = Opened(), threading.Barrier(8)

        def ask(number: int, made: Opened = made, ready: threading.Barrier = ready) -> None:
            ready.wait()
            made.run("ab"[number % 2])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(8)))
        assert made.opened == ["alone", "together"]
        assert sorted(task for _, task in made.asked) == ["a"] * 4 + ["b"] * 4

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from te_runtime.deferred_session import DeferredSession
from te_runtime.errors import BundleError
from te_runtime.executor import Answerer, SessionExecutor, TaskReader
from te_runtime.manifest import GraphSpec, TaskSpec, TensorSpec
from te_runtime.row_parts import RowPart

X = TensorSpec("x", "float32", ("batch", 2))
H = TensorSpec("h", "float32", ("batch", 3))
PREDICTION = TensorSpec("prediction", "float32", ("batch", 1))
WEIGHTS = TensorSpec("routing_weights", "float32", ("batch", 4))


class FakeSession:
    """A Session that keeps what it was fed and answers with given arrays."""

    def __init__(self, spec: GraphSpec, answers: list[np.ndarray]) -> None:
        self.spec = spec
        self.answers = answers
        self.fed: list[list[str]] = []

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        self.fed.append(list(feeds))
        return self.answers


def tail(name: str, inputs: tuple[TensorSpec, ...], answers: list[np.ndarray]) -> Answerer:
    spec = GraphSpec(f"fp32/tail-{name}.onnx", inputs, (WEIGHTS, PREDICTION))
    return Answerer(TaskSpec(name, PREDICTION, WEIGHTS), FakeSession(spec, answers))


def split(answers: list[np.ndarray]) -> tuple[SessionExecutor, FakeSession, dict[str, FakeSession]]:
    trunk = FakeSession(GraphSpec("fp32/trunk.onnx", (X,), (H,)), [np.zeros((2, 3), dtype=np.float32)])
    tails = [tail("a", (H,), answers), tail("b", (X, H), answers)]
    return (
        SessionExecutor(trunk, tails, model_inputs=["x"], provider="cpu"),
        trunk,
        {t.task.name: t.session for t in tails},
    )


GOOD = [np.ones((2, 4), dtype=np.float32), np.zeros((2, 1), dtype=np.float32)]
FEEDS = {"x": np.zeros((2, 2), dtype=np.float32)}


def test_the_trunk_runs_once_and_only_the_tails_asked_for_run() -> None:
    made, trunk, tails = split(GOOD)
    assert list(made.run(FEEDS, 2, ["b"])) == ["b"]
    assert trunk.fed == [["x"]]
    assert tails["a"].fed == []
    assert tails["b"].fed == [["x", "h"]]
    found = made.run(FEEDS, 2, ["b", "a"])
    assert list(found) == ["b", "a"]
    assert len(trunk.fed) == 2
    assert found["a"].output is GOOD[1]
    assert found["a"].routing_weights is GOOD[0]


def test_no_rows_run_nothing() -> None:
    made, trunk, _ = split(GOOD)
    found = made.run({"x": np.zeros((0, 2), dtype=np.float32)}, 0, ["a"])
    assert trunk.fed == []
    assert found["a"].output.shape == (0, 1)
    assert found["a"].routing_weights.shape == (0, 4)
    assert found["a"].output.dtype == np.float32


@pytest.mark.parametrize("shape", [(1, 1), (2,), (2, 2), (3, 1)])
def test_an_answer_of_another_shape_than_promised_is_refused(shape: tuple[int, ...]) -> None:
    made, _, _ = split([GOOD[0], np.zeros(shape, dtype=np.float32)])
    with pytest.raises(
        BundleError, match=r"tail-a\.onnx: gave 'prediction' of task 'a' for 2 rows with shape"
    ):
        made.run(FEEDS, 2, ["a"])


def test_a_reader_of_a_graph_without_the_task_is_refused() -> None:
    with pytest.raises(BundleError, match="expected 'prediction' of task 'a'"):
        TaskReader(GraphSpec("fp32/g.onnx", (X,), (H,)), TaskSpec("a", PREDICTION, None), "cpu")


class Many:
    """A trunk, tails that answer their number, and joint tails that answer their number and a half; all tails are
    deferred.
    """

    def __init__(self, count: int) -> None:
        self.names = [f"t{number}" for number in range(count)]
        self.loaded: list[str] = []
        trunk = GraphSpec("fp32/trunk.onnx", (X,), (H,))
        self.trunk = FakeSession(trunk, [np.zeros((2, 3), dtype=np.float32)])
        answerers = [
            Answerer(TaskSpec(name, PREDICTION, None), self.deferred(self.tail(number)))
            for number, name in enumerate(self.names)
        ]
        outputs = tuple(PREDICTION._replace(name=f"{name}.prediction") for name in self.names)
        self.joint = FakeSession(
            GraphSpec("fp32/joint-tails.onnx", (H,), outputs),
            [np.full((2, 1), number + 0.5, dtype=np.float32) for number in range(count)],
        )
        self.executor = SessionExecutor(
            self.trunk,
            answerers,
            model_inputs=["x"],
            provider="cpu",
            joint_tails=self.deferred(self.joint),
        )

    def tail(self, number: int) -> FakeSession:
        spec = GraphSpec(f"fp32/tail-t{number}.onnx", (H,), (PREDICTION,))
        return FakeSession(spec, [np.full((2, 1), number, dtype=np.float32)])

    def deferred(self, session: FakeSession) -> DeferredSession:
        def load() -> FakeSession:
            self.loaded.append(session.spec.path)
            return session

        return DeferredSession(session.spec, load)

    def answers(self, tasks: list[str]) -> list[float]:
        found = self.executor.run(FEEDS, 2, tasks)
        assert list(found) == tasks
        return [float(prediction.output[0, 0]) for prediction in found.values()]


def test_all_tasks_are_answered_by_the_joint_tails_and_some_by_their_own() -> None:
    many = Many(3)
    assert many.loaded == []
    assert many.answers(["t2", "t0", "t1"]) == [2.5, 0.5, 1.5]
    assert many.loaded == ["fp32/joint-tails.onnx"]
    assert many.joint.fed == [["h"]]
    assert many.answers(["t2", "t1"]) == [2, 1]
    assert sorted(many.loaded[1:]) == ["fp32/tail-t1.onnx", "fp32/tail-t2.onnx"]
    assert many.answers(["t0", "t1", "t2"]) == [0.5, 1.5, 2.5]
    assert len(many.trunk.fed) == 3


def test_nine_tenths_of_many_tasks_are_answered_together() -> None:
    many = Many(20)
    assert many.answers(many.names[1:19]) == [number + 0.5 for number in range(1, 19)]
    assert many.answers(many.names[:17]) == list(range(17))


def test_preparing_loads_what_a_call_would() -> None:
    many = Many(3)
    many.executor.prepare(["t1"])
    assert many.loaded == ["fp32/tail-t1.onnx"]
    many.executor.prepare(many.names)
    assert many.loaded == ["fp32/tail-t1.onnx", "fp32/joint-tails.onnx"]
    assert many.trunk.fed == []
    many.answers(["t1"])
    assert len(many.loaded) == 2


def test_parts_are_answered_together_where_most_rows_want_most_tasks() -> None:
    many = Many(3)
    whole = [RowPart(name, None, 2) for name in many.names]
    assert [float(found.output[0, 0]) for found in many.executor.run_parts(FEEDS, 2, whole)] == [
        0.5,
        1.5,
        2.5,
    ]
    assert many.loaded == ["fp32/joint-tails.onnx"]
    two = many.executor.run_parts(FEEDS, 2, whole[:2])
    assert [float(found.output[0, 0]) for found in two] == [0, 1]
    assert sorted(many.loaded[1:]) == ["fp32/tail-t0.onnx", "fp32/tail-t1.onnx"]

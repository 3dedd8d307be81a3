from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from te_runtime.errors import BundleError
from te_runtime.executor import Answerer, SessionExecutor, TaskReader
from te_runtime.manifest import GraphSpec, TaskSpec, TensorSpec

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

"""Which experts are candidates, and which of them go within the budget."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from te_export.models.input_rows import InputRows
from te_export.pruning.choose_experts import choose_experts
from te_export.pruning.expert_use import ExpertUse, measure_use
from te_runtime.manifest import GraphSpec, TensorSpec

X = TensorSpec("x", "float32", ("batch", 2))


class FakeSession:
    """Gives, for each output, what a function makes of the first input; remembers how many rows it got."""

    def __init__(self, outputs: Mapping[str, object]) -> None:
        specs = tuple(TensorSpec(name, "float32", ("batch", 1)) for name in outputs)
        self.spec = GraphSpec("g.onnx", (X,), specs)
        self.made = list(outputs.values())
        self.batches: list[int] = []

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        (x,) = feeds.values()
        self.batches.append(len(x))
        return [make(x) for make in self.made]  # type: ignore[operator]


def use(*largest: float) -> ExpertUse:
    return ExpertUse(mean=tuple(weight / 2 for weight in largest), largest=largest)


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        ((0.9, 0.01, 0.2, 0.001), (3, 1, 2)),
        ((0.9, 0.25, 0.24999, 0.6), (2,)),
        ((0.5, 0.5), ()),
        ((1.0,), ()),
        ((0.1, 0.1, 0.9), (0, 1)),
    ],
)
def test_candidates_stay_under_an_equal_share_least_used_first(
    largest: tuple[float, ...], expected: tuple[int, ...]
) -> None:
    assert use(*largest).candidates() == expected


def test_use_is_the_mean_and_the_largest_weight_of_every_row() -> None:
    def gate(x: np.ndarray) -> np.ndarray:
        return np.stack([x[:, 0], 1 - x[:, 0]], axis=1)

    x = np.linspace(0, 1, 150, dtype=np.float32)[:, None].repeat(2, axis=1)
    outputs = {f"{task}.{kind}": gate for task in "ab" for kind in ("prediction", "routing_weights")}
    joint = FakeSession(outputs)
    found = measure_use(joint, InputRows({"x": x}), ("b", "a"))
    assert list(found) == ["b", "a"]
    assert found["a"].largest == (1.0, 1.0)
    np.testing.assert_allclose(found["a"].mean, [0.5, 0.5], rtol=1e-6)
    assert joint.batches == [64, 64, 22]


def losses(costs: dict[int, float]) -> object:
    return lambda experts: sum(costs[expert] for expert in experts)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(0.0, (3,)), (0.99, (3,)), (1.0, (3, 1)), (2.0, (3, 1)), (5.0, (3, 1, 2)), (4.0, (3, 2))],
)
def test_what_fits_goes_and_what_does_not_is_stepped_over(budget: float, expected: tuple[int, ...]) -> None:
    costs = {3: 0.0, 1: 1.0, 2: 4.0} if budget != 4.0 else {3: 0.0, 1: 4.5, 2: 4.0}
    found = choose_experts([3, 1, 2], count=4, loss=losses(costs), budget=budget)  # type: ignore[arg-type]
    assert found == expected


def test_each_candidate_is_tried_once_with_those_found_before_it() -> None:
    tried: list[tuple[int, ...]] = []

    def loss(experts: tuple[int, ...]) -> float:
        tried.append(experts)
        return 9.0 if 1 in experts else 0.0

    assert choose_experts([0, 1, 2], count=4, loss=loss, budget=1.0) == (0, 2)
    assert tried == [(0,), (0, 1), (0, 2)]


def test_one_expert_stays_even_where_all_are_alike() -> None:
    """Weights of 1/3 each round to just under 1/3 in float32: all three are candidates."""
    share = float(np.nextafter(np.float32(1 / 3), np.float32(0)))
    candidates = use(share, share, share).candidates()
    assert candidates == (0, 1, 2)
    assert choose_experts(candidates, count=3, loss=lambda _: 0.0, budget=0.0) == (0, 1)


def test_a_loss_that_is_no_number_or_has_no_end_fits_no_budget() -> None:
    for loss in (np.inf, np.nan):
        assert choose_experts([0], count=2, loss=lambda _, loss=loss: loss, budget=100.0) == ()

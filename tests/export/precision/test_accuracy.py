"""The figures by hand, against scikit-learn, and by what must hold for any numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, r2_score, roc_auc_score

from te_export.models.exportable import ExportableModel
from te_export.models.input_rows import InputRows
from te_export.precision import accuracy
from te_export.precision.accuracy import TaskAccuracy, TaskOracle, evaluate_oracle, measure_accuracy
from te_export.precision.calibration_data import Labels
from te_export.verify.references import References

BUDGET = 0.5


def measured(
    exact: object, found: object, labels: Labels | None = None, routing: tuple[object, object] | None = None
) -> TaskAccuracy:
    weights = None if routing is None else np.array(routing[0], np.float64)
    oracle = TaskOracle(np.array(exact, np.float64), weights, labels)
    return measure_accuracy(oracle, np.array(found), None if routing is None else np.array(routing[1]))


def one_hot(winners: list[int], width: int = 3) -> NDArray[np.float64]:
    return np.eye(width)[winners]


def values(*numbers: float) -> NDArray[np.float64]:
    return np.array(numbers, np.float64)[:, None]


def normal(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape)


def test_classes_without_labels_are_judged_by_agreement() -> None:
    found = measured(one_hot([0, 1, 2, 0]), one_hot([0, 1, 2, 1]))
    assert (found.rows, found.judged_by, found.metric) == (4, "agreement", "agreement")
    assert (found.before, found.after, found.baseline) == (None, None, None)
    assert found.agreement == 0.75
    assert found.drop_points == 25.0
    assert (found.routing_kl, found.top_expert_agreement) == (None, None)


def test_classes_with_labels_are_judged_by_accuracy() -> None:
    found = measured(one_hot([0, 1, 2, 0]), one_hot([0, 1, 1, 1]), np.array([0, 1, 2, 1]))
    assert (found.judged_by, found.metric) == ("labels", "accuracy")
    assert (found.before, found.after, found.baseline) == (75.0, 75.0, 50.0)
    assert found.drop_points == 0.0
    assert found.agreement == 0.5


def test_a_better_variant_has_a_negative_drop() -> None:
    assert measured(one_hot([0, 1, 2, 0]), one_hot([0, 1, 2, 1]), np.array([0, 1, 2, 1])).drop_points == -25.0
    labels = values(0, 0, 1, 1)
    assert measured(values(1, 2, 1, 2), values(1, 2, 3, 4), labels).drop_points == -50.0
    assert measured(values(1, 2, 4), values(1, 2, 3), values(1, 2, 3)).drop_points == -50.0


@pytest.mark.parametrize(
    ("rows", "lost", "budget"), [(200, 1, 0.5), (1000, 3, 0.3), (3000, 21, 0.7), (70, 7, 10.0)]
)
def test_a_loss_of_exactly_the_budget_is_within_it(rows: int, lost: int, budget: float) -> None:
    exact = one_hot([0] * rows)
    for labels in (None, np.zeros(rows, np.int64)):
        within = measured(exact, one_hot([1] * lost + [0] * (rows - lost)), labels)
        beyond = measured(exact, one_hot([1] * (lost + 1) + [0] * (rows - lost - 1)), labels)
        assert within.drop_points == budget
        assert not beyond.drop_points <= budget


def test_one_output_without_labels_is_judged_by_relative_error() -> None:
    found = measured(values(1, 2, 3), values(1, 2, 4))  # squared error 1, squared deviation 2
    assert (found.judged_by, found.metric) == ("relative error", "relative error")
    assert found.relative_error == 0.5
    assert found.drop_points == 50.0
    assert found.agreement is None


def test_relative_error_is_over_all_outputs_together() -> None:
    found = measured([[1.0, 10.0], [3.0, 10.0]], [[1.0, 11.0], [3.0, 10.0]])
    assert found.relative_error == 0.5  # squared error 1; deviations -1, 1 and 0, 0


def test_an_oracle_that_does_not_vary_is_held_against_its_size() -> None:
    assert measured(values(2, 2, 2), values(2, 2, 2)).relative_error == 0.0
    assert measured(values(2, 2), values(2, 4)).relative_error == 0.5
    assert measured(values(0.1, 0.1 + 1e-17, 0.1), values(0.1, 0.1, np.float32(0.1))).drop_points < 1e-10
    assert measured(values(0, 0), values(0, 0)).relative_error == 0.0
    assert measured(values(0, 0), values(0, 1e-9)).relative_error == math.inf


def test_labels_0_and_1_are_judged_by_the_area_under_the_curve() -> None:
    labels = values(0, 0, 1, 1)
    found = measured(values(-3, -1, 1, 3), values(-3, 1, 1, 3), labels)  # one pair of four is now tied
    assert (found.judged_by, found.metric) == ("labels", "area under the ROC curve")
    assert (found.before, found.after, found.baseline) == (100.0, 87.5, 50.0)
    assert found.drop_points == 12.5
    assert measured(values(-3, -1, 1, 3), values(0, 0, 0, 0), labels).after == 50.0
    assert measured(values(-3, -1, 1, 3), values(3, 1, -1, -3), labels).drop_points == 100.0


def test_other_values_are_judged_by_r_squared() -> None:
    found = measured(values(1, 2, 3), values(1, 2, 4), values(1, 2, 3))
    assert (found.judged_by, found.metric) == ("labels", "R²")
    assert (found.before, found.after, found.baseline) == (100.0, 50.0, 0.0)
    assert found.drop_points == 50.0


@pytest.mark.parametrize("seed", range(5))
def test_scikit_learn_finds_the_same(seed: int) -> None:
    exact, rng = normal(97, 3, seed=seed), np.random.default_rng(seed)
    found = exact + normal(97, 3, seed=seed + 100)

    classes = rng.integers(0, 3, 97)
    by_class = measured(exact, found, classes)
    assert by_class.before == pytest.approx(100 * accuracy_score(classes, exact.argmax(axis=1)), abs=1e-9)
    assert by_class.after == pytest.approx(100 * accuracy_score(classes, found.argmax(axis=1)), abs=1e-9)

    is_positive = rng.integers(0, 2, (97, 1)).astype(np.float64)
    exact_scores, scores = exact[:, :1].round(1), found[:, :1].round(0)  # rounding makes ties
    by_area = measured(exact_scores, scores, is_positive)
    assert by_area.before == pytest.approx(
        100 * roc_auc_score(is_positive[:, 0], exact_scores[:, 0]), abs=1e-9
    )
    assert by_area.after == pytest.approx(100 * roc_auc_score(is_positive[:, 0], scores[:, 0]), abs=1e-9)

    truth = exact + 0.3 * normal(97, 3, seed=seed + 200)
    by_value = measured(exact, found, truth)
    for ours, answers in ((by_value.before, exact), (by_value.after, found)):
        assert ours == pytest.approx(
            100 * r2_score(truth, answers, multioutput="variance_weighted"), abs=1e-9
        )
    unexplained = 1 - r2_score(exact, found, multioutput="variance_weighted")
    assert by_value.relative_error == pytest.approx(unexplained, abs=1e-12)
    for result in (by_class, by_area, by_value):
        assert result.before is not None
        assert result.after is not None
        assert result.drop_points == pytest.approx(result.before - result.after, abs=1e-9)


def test_routing_by_hand() -> None:
    exact, found = [[0.5, 0.5], [0.25, 0.75]], [[0.25, 0.75], [0.25, 0.75]]
    result = measured(values(1, 2), values(1, 2), routing=(exact, found))
    assert result.routing_kl == pytest.approx(0.5 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3)), rel=1e-12)
    assert result.top_expert_agreement == 0.5
    assert result.drop_points == 0.0


def test_routing_weights_of_zero() -> None:
    both = measured(values(1), values(1), routing=([[1.0, 0.0]], [[1.0, 0.0]]))
    assert both.routing_kl == 0.0
    exact_only = measured(values(1), values(1), routing=([[1.0, 0.0]], [[0.5, 0.5]]))
    assert exact_only.routing_kl == pytest.approx(math.log(2), rel=1e-12)
    found_only = measured(values(1), values(1), routing=([[0.5, 0.5]], np.array([[1.0, 0.0]], np.float32)))
    assert found_only.routing_kl is not None
    assert 40 < found_only.routing_kl < 50


def test_routing_weights_rounded_to_float16_diverge_little() -> None:
    weights = np.exp(6 * normal(500, 8))
    weights /= weights.sum(axis=1, keepdims=True)
    result = measured(normal(500, 1), normal(500, 1), routing=(weights, weights.astype(np.float16)))
    assert result.routing_kl is not None
    assert 0 <= result.routing_kl < 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("exact", "labels"),
    [
        (normal(40, 3), None),
        (normal(40, 1), None),
        (normal(40, 3), np.arange(40) % 3),
        (normal(40, 1), np.arange(40.0)[:, None] % 2),
        (normal(40, 1), normal(40, 1, seed=1)),
        (normal(40, 3), normal(40, 3, seed=1)),
    ],
)
def test_outputs_that_are_not_finite_never_pass(
    exact: NDArray[np.float64], labels: Labels | None, value: float
) -> None:
    broken = exact.copy()
    broken[7, 0] = value
    weights = np.full((40, 4), 0.25)
    broken_weights = weights.copy()
    broken_weights[7, 1] = value
    for found in (
        measured(exact, broken, labels),
        measured(broken, exact, labels),
        measured(broken, broken, labels),
        measured(exact, exact, labels, routing=(weights, broken_weights)),
        measured(exact, exact, labels, routing=(broken_weights, weights)),
    ):
        assert found.drop_points == math.inf
        assert not found.drop_points <= 1e308
        assert found.after is None
    routed = measured(exact, exact, labels, routing=(weights, broken_weights))
    assert routed.routing_kl == math.inf
    assert routed.top_expert_agreement == 39 / 40
    assert measured(exact, broken, labels).relative_error == math.inf


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(2, 60),
    width=st.integers(1, 5),
    kind=st.sampled_from(["none", "classes", "values", "binary"]),
    noise=st.sampled_from([0.0, 1e-9, 0.1, 10.0]),
)
@settings(max_examples=120, deadline=None)
def test_what_holds_for_any_numbers(seed: int, rows: int, width: int, kind: str, noise: float) -> None:
    rng = np.random.default_rng(seed)
    exact = rng.standard_normal((rows, width))
    weights = rng.dirichlet(np.full(4, 0.2), rows)
    found, found_weights = exact + noise * rng.standard_normal(exact.shape), rng.dirichlet(np.ones(4), rows)
    labels: Labels | None = {
        "classes": rng.integers(0, width, rows),
        "values": rng.standard_normal((rows, width)),
        "binary": (np.arange(rows) % 2)[:, None].astype(np.float64),
    }.get(kind)
    if kind == "binary":
        exact, found = exact[:, :1], found[:, :1]
    result = measured(exact, found, labels, routing=(weights, found_weights))
    order = rng.permutation(rows)
    moved = measured(
        exact[order],
        found[order],
        None if labels is None else labels[order],
        routing=(weights[order], found_weights[order]),
    )

    same = measured(exact, exact, labels, routing=(weights, weights))
    assert same.drop_points == 0.0
    assert same.agreement in (None, 1.0)
    assert (same.relative_error, same.routing_kl, same.top_expert_agreement) == (0.0, 0.0, 1.0)
    assert same.before == same.after
    assert result.drop_points == pytest.approx(moved.drop_points, rel=1e-9, abs=1e-9)
    assert result.routing_kl == pytest.approx(moved.routing_kl, rel=1e-9)
    assert result.routing_kl is not None
    assert result.routing_kl > 0
    assert result.drop_points <= 100 or kind in ("none", "values")


def test_a_variant_may_be_of_any_floating_dtype() -> None:
    exact = normal(50, 3)
    for dtype in (np.float16, np.float32, np.float64):
        result = measured(exact, exact.astype(dtype))
        assert result.drop_points == 0.0
        assert result.relative_error <= np.finfo(dtype).eps ** 2


@pytest.mark.parametrize(
    ("exact", "found", "labels", "routing", "message"),
    [
        (normal(4, 3), normal(5, 3), None, None, "prediction: got shape"),
        (normal(4, 3), normal(4, 2), None, None, "prediction: got shape"),
        (normal(0, 3), normal(0, 3), None, None, "at least one row"),
        (normal(4, 3), normal(4, 3), np.zeros(5, np.int64), None, "labels: got 5 rows, expected 4"),
        (normal(4, 1), normal(4, 1), np.ones((4, 1)), None, "one class alone"),
        (normal(4, 1), normal(4, 1), np.full((4, 1), 2.0), None, "all alike"),
        (normal(4, 1), normal(4, 1), None, (normal(4, 3), normal(4, 2)), "routing weights: got shape"),
    ],
)
def test_what_cannot_be_compared(
    exact: object, found: object, labels: Labels | None, routing: tuple[object, object] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measured(exact, found, labels, routing)


def test_routing_weights_on_one_side_alone() -> None:
    with pytest.raises(ValueError, match="must both have them"):
        measure_accuracy(TaskOracle(normal(4, 1), None, None), normal(4, 1), normal(4, 3))
    with pytest.raises(ValueError, match="must both have them"):
        measure_accuracy(TaskOracle(normal(4, 1), normal(4, 3), None), normal(4, 1), None)


@pytest.mark.parametrize("values_at_once", [1, 7 * 116, 2**23])
def test_the_oracle_is_the_one_of_the_parity_check_however_it_is_cut(
    exportable: ExportableModel, references: References, values_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "_VALUES_AT_ONCE", values_at_once)
    x = references.rows.x[:60]
    labels = {"task_2": np.zeros(60, np.int64)}
    found = evaluate_oracle(exportable, x, labels)
    assert tuple(found) == exportable.task_names
    for name, task in references.tasks.items():
        for ours, theirs in (
            (found[name].prediction, task.prediction.oracle),
            (found[name].routing_weights, task.routing_weights.oracle),
        ):
            assert ours is not None
            assert ours.dtype == np.float64
            np.testing.assert_allclose(ours, theirs[:60], rtol=1e-11, atol=1e-13)  # sums in another order
    assert [name for name, task in found.items() if task.labels is not None] == ["task_2"]


def test_rows_that_may_not_be_written_to_are_read(exportable: ExportableModel) -> None:
    x = normal(8, 20).astype(np.float32)
    x.flags.writeable = False
    rows = InputRows({"x": x})
    assert len(evaluate_oracle(exportable, rows)["task_0"].prediction) == 8


def test_torch_float32_is_well_within_the_budget(references: References) -> None:
    rows = len(references.rows)
    for task in references.tasks.values():
        oracle = TaskOracle(task.prediction.oracle, task.routing_weights.oracle, None)
        found = measure_accuracy(oracle, task.prediction.torch[:rows], task.routing_weights.torch[:rows])
        assert found.drop_points <= BUDGET
        assert found.routing_kl is not None
        assert found.routing_kl < 1e-9

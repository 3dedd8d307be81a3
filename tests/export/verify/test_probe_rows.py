"""Probe rows follow from a seed and the model, are finite, and move the routing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from te_export.errors import GateError
from te_export.models.exportable import ExportableModel
from te_export.models.input_rows import InputRows
from te_export.models.task_expert import TaskExpertModel
from te_export.verify.probe_rows import ORDINARY, ProbeRows, make_probe_rows
from te_export.verify.references import References, utilization

MakeModel = Callable[..., TaskExpertModel]
Load = Callable[..., ExportableModel]


def group(rows: ProbeRows, name: str) -> np.ndarray:
    (found,) = [rows.x.arrays["x"][start:stop] for group, start, stop in rows.groups if group == name]
    return found


@torch.no_grad()
def answers(model: ExportableModel, x: InputRows) -> list[torch.Tensor]:
    return list(model.module(*x.tensors()))


def test_the_same_model_gives_the_same_rows(exportable: ExportableModel, references: References) -> None:
    torch.manual_seed(99)
    np.random.seed(99)
    again = make_probe_rows(exportable)

    assert again.groups == references.rows.groups
    assert again.x.arrays["x"].tobytes() == references.rows.x.arrays["x"].tobytes()


def test_groups_are_contiguous_and_cover_all_rows(references: References) -> None:
    rows = references.rows

    assert [name for name, _, _ in rows.groups] == [ORDINARY, "large", "tiny", "routing"]
    assert [stop - start for _, start, stop in rows.groups] == [320, 80, 40, 80]
    assert [start for _, start, _ in rows.groups] == [0, *(stop for _, _, stop in rows.groups[:-1])]
    assert rows.groups[-1][2] == len(rows) == 520
    assert list(rows.x.arrays) == ["x"]
    assert rows.x.arrays["x"].shape == (520, 20)
    assert rows.x.arrays["x"].dtype == np.float32


def test_each_group_is_what_its_name_says(references: References) -> None:
    rows = references.rows
    normal, uniform = np.split(group(rows, ORDINARY), 2)

    assert abs(normal.std() - 1) < 0.05
    assert 0 <= uniform.min() < 0.01 < 0.99 < uniform.max() < 1
    large = np.abs(group(rows, "large")).max(axis=1)
    assert 10 < large.min() < 50 < 200 < large.max() < 1000
    tiny = np.abs(group(rows, "tiny"))
    assert tiny.max() < 1
    assert (tiny[0] == 0).all()
    assert (tiny[1:].max(axis=1) > 0).all()


def test_rows_and_what_torch_answers_are_finite(exportable: ExportableModel, references: References) -> None:
    assert np.isfinite(references.rows.x.arrays["x"]).all()
    for output in answers(exportable, references.rows.x):
        assert bool(torch.isfinite(output).all())


@pytest.mark.parametrize(("seed", "ahead"), [(1, 4.0), (2, 4.0), (1, 40.0)])
def test_an_expert_that_no_ordinary_row_chooses_wins_some_row_too(
    seed: int, ahead: float, make_model: MakeModel, load: Load
) -> None:
    state = make_model(seed, num_experts=2).state_dict()
    for task in range(3):  # logits relu(e) and ahead + relu(-e), where e is one feature of one expert
        layer_0, layer_2 = (state[f"gating_networks.{task}.gate.{layer}.weight"] for layer in (0, 2))
        layer_0.zero_()
        layer_0[0, task], layer_0[1, task] = 1.0, -1.0
        layer_2.copy_(torch.eye(2, 8))
        state[f"gating_networks.{task}.gate.2.bias"].copy_(torch.tensor([0.0, ahead]))
    model = load(state)

    rows = make_probe_rows(model)

    for task_weights in answers(model, rows.x)[2::2]:
        winners = task_weights.argmax(dim=1)
        assert set(winners[:320].tolist()) == {1}
        assert set(winners.tolist()) == {0, 1}


def test_routing_rows_reach_further_than_ordinary_ones(references: References) -> None:
    (start, stop) = next((a, b) for name, a, b in references.rows.groups if name == "routing")
    for task in references.tasks.values():
        weights = task.routing_weights.oracle
        assert (weights[start:stop].max(axis=0) > weights[:320].max(axis=0)).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 1, "task_output_dims": (1,)},
        {"num_experts": 40, "task_output_dims": (1,) * 6},  # more (task, expert) pairs than routing rows
        {"input_dim": 1},
        {"expert_dim": 2},
    ],
)
def test_corner_configs_have_rows_too(changes: dict[str, object], make_model: MakeModel, load: Load) -> None:
    model = load(make_model(5, **changes).state_dict())

    rows = make_probe_rows(model)

    assert len(rows) == 520
    assert np.isfinite(rows.x.arrays["x"]).all()


def test_a_gate_that_never_moves_is_no_problem(make_model: MakeModel, load: Load) -> None:
    state = make_model().state_dict()
    for name in [name for name in state if name.startswith("gating_networks")]:
        state[name].zero_()

    rows = make_probe_rows(load(state))

    assert np.isfinite(rows.x.arrays["x"]).all()


def test_a_model_that_overflows_on_ordinary_rows_is_refused(make_model: MakeModel, load: Load) -> None:
    state = {name: tensor * 1e12 for name, tensor in make_model().state_dict().items()}

    with pytest.raises(GateError, match="this model overflows float32"):
        make_probe_rows(load(state))


def test_no_group_leaves_float32_where_large_rows_just_stay_within(make_model: MakeModel, load: Load) -> None:
    state = make_model().state_dict()
    for name in [name for name in state if name.startswith("task_heads") and name.endswith("bias")]:
        state[name].zero_()
    model = load(state)
    large = group(make_probe_rows(model), "large")
    reach = max(float(values.abs().max()) for values in answers(model, InputRows({"x": large}))[1::2])
    for name in [name for name in state if name.startswith("task_heads") and name.endswith("3.weight")]:
        state[name].mul_(2e38 / reach)
    model = load(state)

    rows = make_probe_rows(model)

    for output in answers(model, rows.x):
        assert bool(torch.isfinite(output).all())


def test_the_report_says_how_far_routing_was_exercised(references: References) -> None:
    for task in utilization(references):
        weights = references.tasks[task.task].routing_weights.oracle
        assert task.mean == pytest.approx(weights[:320].mean(axis=0))
        assert task.low == pytest.approx(weights.min(axis=0))
        assert task.high == pytest.approx(weights.max(axis=0))
        assert task.wins == tuple(np.bincount(weights.argmax(axis=1), minlength=3))

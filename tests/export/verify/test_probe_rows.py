"""Probe rows follow from a seed and the model, are finite, and move the routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from te_export.errors import GateError
from te_export.models.exportable import ExportableModel, ModelInput, TaskOutput
from te_export.models.input_rows import InputRows
from te_export.models.task_expert import TaskExpertModel
from te_export.verify.probe_rows import ORDINARY, ProbeRows, make_probe_rows
from te_export.verify.references import References, evaluate_references, utilization

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


# Models of other families: several inputs, integers, no gates, examples


class Gated(nn.Module):
    """`mix` makes (B, 4) of the inputs; each task has a head over that, and a gate of two experts if it is gated."""

    def __init__(self, mix: Callable[..., torch.Tensor], gated: tuple[bool, ...]) -> None:
        super().__init__()
        self.mix, self.gated = mix, gated
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in gated)
        self.gates = nn.ModuleList(nn.Linear(4, 2) for _ in gated)
        self.embedding = nn.Embedding(7, 4)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.mix(self, *inputs)
        outputs = []
        for head, gate, is_gated in zip(self.heads, self.gates, self.gated, strict=True):
            outputs.append(head(features))
            if is_gated:
                outputs.append(torch.softmax(gate(features), dim=1))
        return tuple(outputs)


class Sum(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x.sum(dim=1),)


def module_of(
    *inputs: ModelInput, mix: Callable[..., torch.Tensor], gated: tuple[bool, ...] = (True, True)
) -> ExportableModel:
    torch.manual_seed(3)
    module = Gated(mix, gated).eval()
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    return ExportableModel(
        family="test",
        config={},
        module=module,
        inputs=inputs,
        tasks=tuple(
            TaskOutput(f"task_{index}", (3,), 2 if is_gated else None, frozenset(sizes))
            for index, is_gated in enumerate(gated)
        ),
        expert_features=None,
        trunk_parameters=frozenset(),
        unused_parameters=(),
        notes=(),
        parameter_prefix="",
        parameter_sizes=sizes,
    )


def arrays_of(rows: ProbeRows, name: str) -> dict[str, np.ndarray]:
    (found,) = [rows.x[start:stop].arrays for group, start, stop in rows.groups if group == name]
    return dict(found)


def group_names(rows: ProbeRows) -> list[str]:
    return [name for name, _, _ in rows.groups]


X = ModelInput("x", "float32", (4,))


def floats_and_ids(module: Gated, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return x + module.embedding(ids).mean(dim=1)


def test_floats_and_integers_have_every_group_and_stay_in_step() -> None:
    ids = ModelInput("ids", "int64", (3,), below=7)
    model = module_of(X, ids, mix=floats_and_ids)

    rows = make_probe_rows(model)

    assert group_names(rows) == [ORDINARY, "large", "tiny", "routing"]
    assert [stop - start for _, start, stop in rows.groups] == [320, 80, 40, 80]
    assert {name: (array.shape, array.dtype) for name, array in rows.x.arrays.items()} == {
        "x": ((520, 4), np.dtype(np.float32)),
        "ids": ((520, 3), np.dtype(np.int64)),
    }
    for name in group_names(rows):
        found = arrays_of(rows, name)["ids"]
        assert set(np.unique(found)) == set(range(7)), name
    assert np.abs(arrays_of(rows, "large")["x"]).max() > 50
    assert (arrays_of(rows, "tiny")["x"][0] == 0).all()
    for output in answers(model, rows.x):
        assert bool(torch.isfinite(output).all())


def test_routing_rows_move_floats_alone_and_further_than_where_they_began() -> None:
    ids = ModelInput("ids", "int64", (3,), below=7)
    model = module_of(X, ids, mix=floats_and_ids)

    rows = make_probe_rows(model)

    pool = {tuple(row) for row in rows.x.arrays["ids"][:440].tolist()}
    routing = arrays_of(rows, "routing")
    assert {tuple(row) for row in routing["ids"].tolist()} <= pool
    begun = {row.tobytes() for row in rows.x.arrays["x"][:440]}
    assert sum(row.tobytes() not in begun for row in routing["x"]) > 40  # a weight of 1 has nowhere to go
    for weights in answers(model, rows.x)[1::2]:
        assert bool((weights[440:].amax(dim=0) >= weights[:320].amax(dim=0)).all())


def test_the_same_model_of_several_inputs_gives_the_same_rows() -> None:
    ids = ModelInput("ids", "int32", (3,), below=7)
    first, again = (make_probe_rows(module_of(X, ids, mix=floats_and_ids)) for _ in range(2))

    assert first.x.arrays["ids"].dtype == np.int32
    for name, array in first.x.arrays.items():
        assert again.x.arrays[name].tobytes() == array.tobytes()


def test_integers_alone_have_neither_large_nor_tiny_rows() -> None:
    """And rows that the gate reads nothing but integers in are chosen from the others, not moved."""
    ids = ModelInput("ids", "int64", (3,), below=7)
    model = module_of(ids, mix=lambda module, ids: module.embedding(ids).sum(dim=1))

    rows = make_probe_rows(model)

    assert [(name, stop - start) for name, start, stop in rows.groups] == [(ORDINARY, 320), ("routing", 80)]
    ordinary, routing = arrays_of(rows, ORDINARY)["ids"], arrays_of(rows, "routing")["ids"]
    assert {tuple(row) for row in routing.tolist()} <= {tuple(row) for row in ordinary.tolist()}
    for weights in answers(model, rows.x)[1::2]:
        assert torch.equal(weights[320:].amax(dim=0), weights[:320].amax(dim=0))


def test_gates_that_read_integers_alone_beside_floats_leave_their_rows_as_they_are() -> None:
    class IdsChoose(Gated):
        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x, ids = inputs
            weights = torch.softmax(self.gates[0](self.embedding(ids).sum(dim=1)), dim=1)
            return (self.heads[0](x) * weights[:, :1], weights)

    model = module_of(X, ModelInput("ids", "int64", (3,), below=7), mix=floats_and_ids, gated=(True,))
    module = IdsChoose(floats_and_ids, (True,)).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    model = dataclasses.replace(model, module=module)

    rows = make_probe_rows(model)

    begun = {row.tobytes() for row in rows.x.arrays["x"][:440]}
    assert {row.tobytes() for row in arrays_of(rows, "routing")["x"]} <= begun


def test_without_a_gate_there_are_no_routing_rows() -> None:
    model = module_of(X, mix=lambda module, x: x, gated=(False, False))

    rows = make_probe_rows(model)

    assert [(name, stop - start) for name, start, stop in rows.groups] == [
        (ORDINARY, 320),
        ("large", 80),
        ("tiny", 40),
    ]
    assert utilization(evaluate_references(model, rows)) == ()


def test_a_model_without_a_parameter_has_rows_too() -> None:
    model = dataclasses.replace(
        module_of(X, mix=lambda module, x: x, gated=(False,)),
        module=Sum(),
        tasks=(TaskOutput("sum", (), None, frozenset()),),
    )

    assert len(make_probe_rows(model)) == 440


def test_one_gate_among_tasks_is_enough_for_routing_rows() -> None:
    model = module_of(X, mix=lambda module, x: x, gated=(False, True, False))

    rows = make_probe_rows(model)
    references = evaluate_references(model, rows)

    assert group_names(rows)[-1] == "routing"
    (weights,) = (
        found
        for name, found in zip(model.output_names, answers(model, rows.x), strict=True)
        if "rout" in name
    )
    assert bool((weights[440:].amax(dim=0) > weights[:320].amax(dim=0)).all())
    assert [task.routing_weights is None for task in references.tasks.values()] == [True, False, True]
    assert [task.task for task in utilization(references)] == ["task_1"]


def test_inputs_of_rank_one_are_a_number_per_row() -> None:
    age = ModelInput("age", "float32", ())
    ids = ModelInput("ids", "int64", (), below=7)
    is_new = ModelInput("is_new", "bool", ())
    model = module_of(
        age,
        ids,
        is_new,
        mix=lambda module, age, ids, is_new: module.embedding(ids) + torch.where(is_new, age, -age)[:, None],
    )

    rows = make_probe_rows(model)

    assert group_names(rows) == [ORDINARY, "large", "tiny", "routing"]
    assert {name: (array.shape, array.dtype.name) for name, array in rows.x.arrays.items()} == {
        "age": ((520,), "float32"),
        "ids": ((520,), "int64"),
        "is_new": ((520,), "bool"),
    }
    assert arrays_of(rows, "tiny")["age"][0] == 0
    assert np.abs(arrays_of(rows, "large")["age"]).max() > 50
    assert len(np.unique(arrays_of(rows, ORDINARY)["age"])) == 320
    assert len(evaluate_references(model, rows).tasks) == 2


def test_bools_are_both_in_every_group() -> None:
    flags = ModelInput("flags", "bool", (4,))
    model = module_of(X, flags, mix=lambda module, x, flags: torch.where(flags, x, -x))

    rows = make_probe_rows(model)

    assert rows.x.arrays["flags"].dtype == np.bool_
    for name in group_names(rows):
        assert 0.3 < arrays_of(rows, name)["flags"].mean() < 0.7, name


def test_integers_of_no_known_range_are_those_of_the_examples_place_by_place() -> None:
    examples = np.array([[0, 50], [1, 60], [2, 70]], np.int64)
    ids = ModelInput("ids", "int64", (2,), examples=examples)
    model = module_of(ids, mix=lambda module, ids: module.embedding(ids % 7).sum(dim=1))

    found = make_probe_rows(model).x.arrays["ids"]

    assert set(np.unique(found[:, 0])) == {0, 1, 2}
    assert set(np.unique(found[:, 1])) == {50, 60, 70}
    pairs = {tuple(row) for row in found.tolist()}
    assert len(pairs) == 9  # rows of examples are mixed: routing is to move more than the examples do


def test_a_mask_leaves_the_places_that_the_examples_leave() -> None:
    mask = ModelInput("mask", "bool", (3,), examples=np.array([[True, False, True], [True, True, False]]))
    model = module_of(X, mask, mix=lambda module, x, mask: x * mask.float().mean(dim=1, keepdim=True))

    found = make_probe_rows(model).x.arrays["mask"]

    assert found[:, 0].all()
    assert {tuple(row) for row in found[:, 1:].tolist()} == {
        (a, b) for a in (False, True) for b in (False, True)
    }


def test_a_flag_is_both_whatever_the_examples_hold() -> None:
    flag = ModelInput("flag", "bool", (), examples=np.array([True, True]))
    model = module_of(X, flag, mix=lambda module, x, flag: torch.where(flag[:, None], x, -x))

    assert 0.3 < make_probe_rows(model).x.arrays["flag"].mean() < 0.7


def test_integers_of_no_known_range_need_examples() -> None:
    ids = ModelInput("ids", "int64", (2,))
    model = module_of(ids, mix=lambda module, ids: module.embedding(ids).sum(dim=1))

    with pytest.raises(ValueError, match="input 'ids' holds integers and came without examples"):
        make_probe_rows(model)


@pytest.mark.parametrize("count", [1, 3, 500])
def test_examples_of_floats_are_among_the_ordinary_rows(count: int) -> None:
    examples = 1000 + np.arange(count * 4, dtype=np.float32).reshape(count, 4)
    model = module_of(dataclasses.replace(X, examples=examples), mix=lambda module, x: x)

    rows = make_probe_rows(model)

    ordinary = arrays_of(rows, ORDINARY)["x"]
    known = ordinary[ordinary.min(axis=1) >= 1000]
    np.testing.assert_array_equal(known, examples[np.arange(80) % count])
    others = ordinary[ordinary.max(axis=1) < 1000]
    assert len(others) == 240
    normal, uniform = others[:160], others[160:]
    assert abs(normal.std() - 1) < 0.1
    assert 0 <= uniform.min() < uniform.max() < 1


# Modules that have an answer to some inputs alone


def only_above_ten(module: Gated, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """NaN unless every value is above 10: no normal and no uniform row has an answer."""
    return torch.sqrt(x - 10.0) + module.embedding(ids)


def test_rows_without_an_answer_give_way_to_the_examples() -> None:
    examples = 10 + np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    ids = np.array([4, 5, 6])
    x = dataclasses.replace(X, examples=examples)
    model = module_of(x, ModelInput("ids", "int64", (), examples=ids, below=7), mix=only_above_ten)

    rows = make_probe_rows(model)

    assert group_names(rows) == [ORDINARY, "large", "tiny", "routing"]
    for name in (ORDINARY, "tiny"):
        found = arrays_of(rows, name)
        of = {row.tobytes(): index for index, row in enumerate(examples)}
        which = [of[row.tobytes()] for row in found["x"]]
        assert set(which) == {0, 1, 2}
        if name == "tiny":  # ordinary rows hold examples that have an answer already, with any integer
            assert found["ids"].tolist() == [4 + index for index in which]
    for output in answers(model, rows.x):
        assert bool(torch.isfinite(output).all())


def test_rows_with_an_answer_stay_where_others_give_way() -> None:
    """Half of the normal rows, and all uniform ones, have an answer."""
    examples = np.full((2, 4), 3.0, np.float32)
    model = module_of(
        dataclasses.replace(X, examples=examples),
        mix=lambda module, x: torch.sqrt(x[:, :1]) + x,
        gated=(False,),
    )

    ordinary = arrays_of(make_probe_rows(model), ORDINARY)["x"]

    given_way = (ordinary[:160] == 3.0).all(axis=1)
    assert 50 < given_way.sum() < 110
    assert (ordinary[:160][~given_way][:, 0] > 0).all()
    assert len(np.unique(ordinary[:160][~given_way][:, 0])) == (~given_way).sum()
    assert (ordinary[160:240].max(axis=1) < 1).all()
    assert (ordinary[240:] == 3.0).all()


def test_a_model_without_an_answer_to_its_examples_is_refused() -> None:
    x = dataclasses.replace(X, examples=np.zeros((3, 4), np.float32))
    model = module_of(x, ModelInput("ids", "int64", (), examples=np.arange(3), below=7), mix=only_above_ten)

    with pytest.raises(GateError, match="infinite or NaN on the example inputs"):
        make_probe_rows(model)


def test_a_model_of_integers_without_an_answer_to_its_examples_is_refused() -> None:
    ids = ModelInput("ids", "int64", (), examples=np.arange(3), below=7)
    model = module_of(ids, mix=lambda module, ids: torch.log(module.embedding(ids) * 0))

    with pytest.raises(GateError, match="infinite or NaN on the example inputs"):
        make_probe_rows(model)


def test_an_input_without_examples_beside_one_with_examples_takes_a_row_that_has_an_answer() -> None:
    """And where no row has one, the model is refused."""
    examples = np.full((2, 4), 20.0, np.float32)
    inputs = (dataclasses.replace(X, examples=examples), ModelInput("ids", "int64", (), below=7))

    for output in answers(model := module_of(*inputs, mix=only_above_ten), make_probe_rows(model).x):
        assert bool(torch.isfinite(output).all())
    with pytest.raises(GateError, match="infinite or NaN on the example inputs"):
        make_probe_rows(module_of(*inputs, mix=lambda module, x, ids: only_above_ten(module, x * 0, ids)))

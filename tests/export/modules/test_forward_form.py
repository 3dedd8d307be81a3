"""How forward is asked and how it answers: each form is read off the module, and what is none is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from te_export.errors import UsageError
from te_export.modules.all_tasks import AllTasks
from te_export.modules.example_inputs import read_example_inputs
from te_export.modules.forward_form import ForwardForm, find_forward_form, shown_form

ROWS, FEATURES = 5, 4
X = torch.arange(ROWS * FEATURES, dtype=torch.float32).reshape(ROWS, FEATURES)


class Answering(nn.Module):
    """forward(x) gives what a function makes of x."""

    def __init__(self, answer: Callable[[Tensor], Any], **attributes: object) -> None:
        super().__init__()
        self.answer = answer
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.answer(x)


class ById(Answering):
    """Three heads in a list."""

    def __init__(self, **attributes: object) -> None:
        super().__init__(lambda x: [x[:, :1], x[:, 1:2], x[:, 2:3]], **attributes)

    def forward(self, x: Tensor, task_id: int) -> Any:
        return self.answer(x)[task_id]


class ByName(Answering):
    """Two heads in a dict."""

    def __init__(self, **attributes: object) -> None:
        super().__init__(lambda x: {"click": x[:, :1], "buy": x[:, 1:2]}, **attributes)

    def forward(self, x: Tensor, task: str) -> Any:
        return self.answer(x)[task]


def form_of(module: nn.Module, names: Sequence[str] | None = None, example: Any = X) -> ForwardForm:
    return find_forward_form(module, read_example_inputs(example, module), names)


def answers(module: nn.Module, names: Sequence[str] | None = None, example: Any = X) -> dict[str, Tensor]:
    """Each task's prediction by AllTasks, which follows the form."""
    inputs = read_example_inputs(example, module)
    form = find_forward_form(module, inputs, names)
    found = AllTasks(module, inputs, form)(*inputs.rows.tensors())
    return dict(zip(form.tasks, found, strict=True))


def require_columns(found: dict[str, Tensor], **columns: int) -> None:
    """Each task is that column of X, as (B, 1)."""
    assert list(found) == list(columns)
    for task, column in columns.items():
        assert torch.equal(found[task], X[:, column : column + 1])


# What forward(x) gives


@pytest.mark.parametrize(
    ("answer", "kind", "tasks"),
    [
        (lambda x: x[:, :1], "tensor", ("task_0",)),
        (lambda x: x[:, 0], "tensor", ("task_0",)),
        (lambda x: x[:, :, None], "tensor", ("task_0",)),
        (lambda x: x[:, :3], "columns", ("task_0", "task_1", "task_2")),
        (lambda x: (x[:, :1], x[:, 1:]), "sequence", ("task_0", "task_1")),
        (lambda x: [x[:, 0], x[:, 1]], "sequence", ("task_0", "task_1")),
        (lambda x: (x[:, :1],), "sequence", ("task_0",)),
        (lambda x: {"click": x[:, :1], "buy": x[:, 1]}, "mapping", ("click", "buy")),
        (lambda x: {0: x[:, :1], 1: x[:, 1]}, "mapping", ("0", "1")),
        (lambda x: (x[:, :1], {"aux": x}), "tensor", ("task_0",)),
        (lambda x: (x[:, :2], None), "columns", ("task_0", "task_1")),
    ],
    ids=[
        "(B, 1)", "(B,)", "three axes", "(B, T)", "tuple", "list of (B,)", "tuple of one", "dict", "dict by number",
        "with aux", "columns with None",
    ],
)  # fmt: skip
def test_what_forward_answers_is_read(
    answer: Callable[[Tensor], Any], kind: str, tasks: tuple[str, ...]
) -> None:
    form = form_of(Answering(answer))

    assert (form.kind, form.tasks) == (kind, tasks)


def test_one_axis_becomes_a_column() -> None:
    require_columns(answers(Answering(lambda x: [x[:, 0], x[:, 1]])), task_0=0, task_1=1)


def test_columns_are_a_task_each_and_told() -> None:
    form = form_of(Answering(lambda x: x[:, :2]))

    require_columns(answers(Answering(lambda x: x[:, :2])), task_0=0, task_1=1)
    assert "taken as 2 tasks" in form.notes[0]
    assert "pass one task name" in form.notes[0]


def test_columns_with_names_need_no_note() -> None:
    assert form_of(Answering(lambda x: x[:, :2]), ["a", "b"]).notes == ()


def test_one_name_makes_the_columns_one_tasks_outputs() -> None:
    found = answers(Answering(lambda x: x[:, :3]), ["only"])

    assert torch.equal(found["only"], X[:, :3])


def test_what_comes_beside_the_prediction_is_left() -> None:
    require_columns(answers(Answering(lambda x: (x[:, 1], {"gate": x}))), task_0=1)


def test_names_rename_a_tuple_by_place() -> None:
    require_columns(answers(Answering(lambda x: (x[:, 2], x[:, 0])), ["b", "a"]), b=2, a=0)


class Answer(NamedTuple):
    click: Tensor
    rating: Tensor


def test_a_named_tuples_fields_name_its_tasks() -> None:
    module = Answering(lambda x: Answer(x[:, :1], x[:, 1:4]))

    assert {name: answer.shape[1] for name, answer in answers(module).items()} == {"click": 1, "rating": 3}
    assert list(answers(module, ("a", "b"))) == ["a", "b"]


@pytest.mark.parametrize("shape", [(1,), (2, 3)])
def test_several_names_of_one_tensor_are_refused_with_how_to_take_it_apart(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"which is one task, and there are 2 task names: .*y\.unbind\(1\)"):
        form_of(Answering(lambda x: x.new_zeros(ROWS, *shape)), ("a", "b"))


def test_a_key_that_is_no_task_name_is_told_where_it_stands() -> None:
    with pytest.raises(UsageError, match=r"task_names in what forward returns: 'a/b' is not allowed"):
        form_of(Answering(lambda x: {"a/b": x}))


def test_a_dicts_own_names_choose_the_order() -> None:
    module = Answering(lambda x: {"click": x[:, 0], "buy": x[:, 1]})

    require_columns(answers(module, ["buy", "click"]), buy=1, click=0)


def test_other_names_rename_a_dict_by_place() -> None:
    module = Answering(lambda x: {"click": x[:, 0], "buy": x[:, 1]})

    require_columns(answers(module, ["a", "b"]), a=0, b=1)


# forward(x, task)


def test_a_count_of_the_module_says_how_many_tasks_there_are() -> None:
    require_columns(answers(ById(num_tasks=3)), task_0=0, task_1=1, task_2=2)


@pytest.mark.parametrize("attribute", ["num_tasks", "n_tasks", "task_num", "n_task", "num_task"])
def test_every_usual_name_of_the_count(attribute: str) -> None:
    assert form_of(ById(**{attribute: 2})).keys == (0, 1)


@pytest.mark.parametrize("attribute", ["task_names", "task_name", "tasks", "task_list"])
@pytest.mark.parametrize("names", [["click", "buy"], ("click", "buy"), {"click": 1, "buy": 2}])
def test_every_usual_name_of_the_names(attribute: str, names: object) -> None:
    form = form_of(ByName(**{attribute: names}))

    assert (form.kind, form.keys) == ("task name", ("click", "buy"))


def test_names_of_a_module_that_is_asked_by_number() -> None:
    require_columns(answers(ById(task_names=["a", "b", "c"])), a=0, b=1, c=2)


def test_a_modules_own_names_choose_its_numbers_by_name() -> None:
    require_columns(answers(ById(task_names=["a", "b", "c"]), ["c", "a", "b"]), c=2, a=0, b=1)


def test_other_names_rename_a_modules_numbers_by_place() -> None:
    require_columns(answers(ById(task_names=["a", "b", "c"]), ["x", "y", "z"]), x=0, y=1, z=2)


def test_names_given_are_what_a_module_without_any_is_asked_by() -> None:
    require_columns(answers(ByName(), ["buy", "click"]), buy=1, click=0)


def test_other_names_rename_a_module_that_is_asked_by_its_own() -> None:
    require_columns(answers(ByName(task_names=["click", "buy"]), ["a", "b"]), a=0, b=1)


def test_names_alone_say_how_many_numbers_there_are() -> None:
    require_columns(answers(ById(), ["a", "b", "c"]), a=0, b=1, c=2)


def test_fewer_names_than_tasks_are_refused() -> None:
    with pytest.raises(UsageError, match=r"2 names .* 3 tasks"):
        form_of(ById(num_tasks=3), ["a", "b"])


def test_a_task_with_aux() -> None:
    class WithAux(ById):
        def forward(self, x: Tensor, task_id: int) -> Any:
            return super().forward(x, task_id), {"loss": x.sum()}

    require_columns(answers(WithAux(num_tasks=2)), task_0=0, task_1=1)


def test_an_optional_task_is_not_asked_for() -> None:
    class Optional(Answering):
        def forward(self, x: Tensor, task: str | None = None) -> Any:
            return self.answer(x)

    assert form_of(Optional(lambda x: x[:, :1])).kind == "tensor"


def test_nothing_says_how_many_tasks_there_are() -> None:
    with pytest.raises(UsageError, match=r"'task_id'.*--task-names a,b,c"):
        form_of(ById())


def test_a_task_that_cannot_be_asked_for_is_told_both_ways() -> None:
    with pytest.raises(UsageError, match=r"task='like'.*KeyError: 'like'.*task=0.*KeyError: 0"):
        form_of(ByName(), ["like"])


# Several inputs


class Pair(nn.Module):
    num_tasks = 2

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left[:, :1] - right[:, :1]


class PairByTask(Pair):
    def forward(self, left: Tensor, right: Tensor, *, task: int) -> Tensor:  # type: ignore[override]
        return (left - right)[:, task]


class Named(nn.Module):
    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return features["left"][:, :1] - features["right"][:, :1]


NAMED = {"right": X, "left": 3 * X}


@pytest.mark.parametrize("make", [Pair, Named])
def test_named_inputs_go_where_their_names_say(make: type[nn.Module]) -> None:
    (found,) = answers(make(), example=NAMED).values()

    assert torch.equal(found, 2 * X[:, :1])


def test_inputs_in_order() -> None:
    (found,) = answers(Pair(), example=(X, 3 * X)).values()

    assert torch.equal(found, -2 * X[:, :1])


def test_keyword_inputs_with_a_task() -> None:
    found = answers(PairByTask(), example=NAMED)

    assert torch.equal(found["task_1"], 2 * X[:, 1:2])


def test_an_input_that_has_no_example_is_named() -> None:
    class Three(nn.Module):
        def forward(self, x: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
            return x * mask * weight

    with pytest.raises(UsageError, match="also needs mask, weight"):
        form_of(Three())


# Refusals


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: None, "the answer is NoneType"),
        (lambda x: 1.0, "the answer is float"),
        (lambda x: x.sum(), r"shape \(\) for 5 rows"),
        (lambda x: x[:3], r"shape \(3, 4\) for 5 rows"),
        (lambda x: x[:, :1].long(), "int64"),
        (lambda x: (x[:, :1], x.sum()), "element 1 of what forward returns has shape"),
        (lambda x: (x[:, :1], x[:, :1] > 0), "element 1 of what forward returns is torch.bool"),
        (lambda x: {"a": x[:, :1], "b": [x]}, "'b' of what forward returns is list"),
        (lambda x: {"a b": x[:, :1]}, "'a b' is not allowed as a task name"),
        (lambda x: {"a": x[:, :1], "A": x[:, :1]}, "same name when case is ignored"),
        (lambda x: (), "no predictions, but an empty tuple"),
        (lambda x: {}, "no predictions, but an empty dict"),
        (lambda x: x[:, :0], "holds no numbers"),
    ],
)
def test_an_answer_that_holds_no_predictions(answer: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        form_of(Answering(answer))


@pytest.mark.parametrize(
    ("answer", "names", "message"),
    [
        (lambda x: x[:, :3], ["a", "b"], "3 columns, and there are 2 task names"),
        (lambda x: (x[:, :1], x[:, :1]), ["a"], "1 names .* 2 tasks"),
        (
            lambda x: {"a": x[:, :1], "b": x[:, :1]},
            ["a", "c"],
            "task names are a, c, and forward returns a, b",
        ),
        (lambda x: x[:, :1], ["a", "b"], "one task, and there are 2 task names"),
    ],
)
def test_names_that_do_not_fit(answer: Callable[[Tensor], Any], names: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        form_of(Answering(answer), names)


def test_a_forward_that_fails_names_its_line() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x

    with pytest.raises(
        UsageError, match=r"RuntimeError: mat1 .*test_forward_form.py:\d+, in forward: return x @ x"
    ):
        form_of(Failing())


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        (Answering(lambda x: x[:, :1]), "forward(x) → tensor"),
        (Answering(lambda x: x[:, :2]), "forward(x) → tensor with a column per task"),
        (Answering(lambda x: {"a": x}), "forward(x) → dict of tensors"),
        (Answering(lambda x: (x, x)), "forward(x) → tuple of tensors"),
        (ById(num_tasks=3), "forward(x, task_id)"),
        (ByName(tasks=["click", "buy"]), "forward(x, task_name)"),
    ],
)
def test_every_form_is_shown_as_a_person_would_write_it(module: nn.Module, shown: str) -> None:
    assert shown_form(form_of(module)) == shown

"""Which names tasks may have, and which tasks are chosen."""

from __future__ import annotations

import pytest

from te_export.errors import UsageError
from te_export.models.task_names import name_tasks, select_tasks


def test_names_asked_for_win_over_those_in_the_file_and_those_over_numbers() -> None:
    assert name_tasks(2, asked=("a", "b"), in_file=("c", "d")) == ("a", "b")
    assert name_tasks(2, asked=None, in_file=("c", "d")) == ("c", "d")
    assert name_tasks(2, asked=None, in_file=None) == ("task_0", "task_1")


@pytest.mark.parametrize("name", ["a", "A-b_9", "0", "-", "x" * 64])
def test_letters_digits_underscore_and_hyphen_are_allowed(name: str) -> None:
    assert name_tasks(1, asked=(name,), in_file=None) == (name,)


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a.b", "a/b", "..", "a\n", "é", "٣", "x" * 65, "a\x00", "\ud800", "a,b"]
)
@pytest.mark.parametrize("in_file", [False, True])
def test_other_names_are_refused_wherever_they_come_from(name: str, in_file: bool) -> None:
    with pytest.raises(UsageError) as caught:
        name_tasks(1, asked=None if in_file else (name,), in_file=(name,) if in_file else None)

    message = str(caught.value)
    assert ("task_names in the checkpoint" if in_file else "--task-names") in message
    assert "\x00" not in message
    assert "\ud800" not in message
    assert len(message) < 400


@pytest.mark.parametrize("names", [("a", "a"), ("Click", "click")])
def test_names_equal_but_for_case_are_refused(names: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match=f"'{names[0]}' and '{names[1]}' are the same name"):
        name_tasks(2, asked=names, in_file=None)


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")])
def test_the_number_of_names_must_be_the_number_of_tasks(names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=rf"gives {len(names)} names \(a.*but the checkpoint has 2 tasks"):
        name_tasks(2, asked=names, in_file=None)


def test_all_tasks_in_order_or_those_asked_for_in_the_order_asked() -> None:
    names = ("a", "b", "c")

    assert select_tasks(names, None) == (0, 1, 2)
    assert select_tasks(names, ("c", "a")) == (2, 0)


def test_an_unknown_task_is_refused_with_the_nearest_and_the_list() -> None:
    with pytest.raises(UsageError) as caught:
        select_tasks(("click", "buy"), ("clck",))

    assert "Did you mean 'click'?" in str(caught.value)
    assert "click, buy" in str(caught.value)


def test_a_long_list_of_tasks_is_cut() -> None:
    with pytest.raises(UsageError, match=r"task_19, … \(500 in all\)"):
        select_tasks([f"task_{i}" for i in range(500)], ("zzz",))


def test_a_task_asked_for_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="'a' is given twice"):
        select_tasks(("a", "b"), ("a", "b", "a"))


def test_no_task_at_all_is_refused() -> None:
    with pytest.raises(UsageError):
        select_tasks(("a", "b"), ())

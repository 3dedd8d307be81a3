"""How a module's forward is asked for its tasks, and in what shape it answers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from te_export.errors import UsageError
from te_export.models.task_names import name_tasks, select_tasks
from te_export.modules.blame import line_of_error
from te_export.modules.example_inputs import ExampleInputs

__all__ = ["ForwardForm", "find_forward_form", "shown_form"]

Kind = Literal["tensor", "columns", "mapping", "sequence", "task id", "task name"]
_ANSWER = "what forward returns"
_COUNTS = ("num_tasks", "n_tasks", "task_num", "n_task", "num_task")
_NAMES = ("task_names", "task_name", "tasks", "task_list")


@dataclass(frozen=True)
class ForwardForm:
    """One of the ways in which multi-task modules answer.

    Attributes:
        kind: `tensor`: forward(x) → one task's tensor; `columns`: one tensor (B, T), a column per task; `mapping`:
            a dict of tensors by task; `sequence`: a tuple of tensors; `task id`, `task name`: forward(x, task).
        tasks: their names in the bundle.
        keys: what the module itself calls each: the dict's key, the place in the tuple or among the columns, the
            task argument.
        notes: how the answer was read, where that is not the only way.
    """

    kind: Kind
    tasks: tuple[str, ...]
    keys: tuple[object, ...]
    notes: tuple[str, ...] = ()

    def of_tasks(self, asked: Sequence[str] | None) -> ForwardForm:
        """The same for some of the tasks; for None all.

        Raises:
            UsageError: there is no such task.
        """
        chosen = select_tasks(self.tasks, asked)
        tasks, keys = ([values[index] for index in chosen] for values in (self.tasks, self.keys))
        return replace(self, tasks=tuple(map(str, tasks)), keys=tuple(keys))


def find_forward_form(
    module: nn.Module, example: ExampleInputs, task_names: Sequence[str] | None
) -> ForwardForm:
    """Look at forward's parameters and at what it answers to the example.

    Args:
        task_names: a name for every task, where the user gave any.

    Raises:
        UsageError: forward wants something else, fails on the example, or answers with no tensors of a row each.
    """
    wanted = _task_parameter(module, example)
    if wanted is not None:
        return _by_task(module, example, wanted, task_names)
    return _read_answer(_call(module, example), len(example.rows), task_names)


def shown_form(form: ForwardForm) -> str:
    """The form as a person would write it."""
    return {
        "tensor": "forward(x) → tensor",
        "columns": "forward(x) → tensor with a column per task",
        "mapping": "forward(x) → dict of tensors",
        "sequence": "forward(x) → tuple of tensors",
        "task id": "forward(x, task_id)",
        "task name": "forward(x, task_name)",
    }[form.kind]


def _task_parameter(module: nn.Module, example: ExampleInputs) -> inspect.Parameter | None:
    """The parameter of forward that names a task: the one that must be given beside the inputs."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if example.style == "keywords":
        left = [parameter for parameter in parameters if parameter.name not in example.names]
    else:
        left = parameters[example.leading :]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [
        parameter
        for parameter in left
        if parameter.default is inspect.Parameter.empty
        and (parameter.kind in plain or parameter.kind == inspect.Parameter.KEYWORD_ONLY)
    ]
    if len(required) > 1:
        names = ", ".join(parameter.name for parameter in required)
        raise UsageError(
            f"forward of {type(module).__name__} also needs {names}, expected inputs and at most a task: pass an example "
            "for every input (a dict from each parameter's name to its array)"
        )
    return required[0] if required else None


def _by_task(
    module: nn.Module, example: ExampleInputs, wanted: inspect.Parameter, task_names: Sequence[str] | None
) -> ForwardForm:
    own = _own_names(module)
    known = list(task_names or own)
    count = len(own) or _own_count(module) or len(known)
    if not count:
        raise UsageError(
            f"forward takes {wanted.name!r}, and nothing says how many tasks there are: pass --task-names a,b,c (in "
            "Python task_names=...), a name for every task in its order"
        )
    names = name_tasks(count, asked=known or None, in_file=None)
    by_name = wanted.annotation in (str, "str") or (
        wanted.annotation not in (int, "int") and "name" in wanted.name
    )
    chosen = bool(own) and sorted(known) == sorted(
        own
    )  # the module's own names choose by name; others rename by place
    attempts: list[tuple[Kind, tuple[object, ...]]] = [
        ("task id", tuple(map(own.index, known)) if chosen else tuple(range(count))),
        ("task name", tuple(known if chosen else own or known)),
    ]
    if by_name:
        attempts.reverse()
    problems = []
    for kind, keys in attempts:
        if not keys:
            continue
        try:
            for key in keys:
                _first(_call(module, example, {wanted.name: key}), len(example.rows), str(key))
        except UsageError as error:
            problems.append(f"with {wanted.name}={keys[0]!r}: {error}")
            continue
        return ForwardForm(kind, names, keys)
    raise UsageError(f"forward could not be asked for its tasks; {'; '.join(problems)}")


def _own_names(module: nn.Module) -> list[str]:
    for attribute in _NAMES:
        found = getattr(module, attribute, None)
        names = list(found) if isinstance(found, list | tuple | Mapping) else []
        if names and all(isinstance(name, str) for name in names):
            return names
    return []


def _own_count(module: nn.Module) -> int:
    counts = (getattr(module, attribute, None) for attribute in _COUNTS)
    return next((count for count in counts if isinstance(count, int) and count > 0), 0)


def _call(module: nn.Module, example: ExampleInputs, extra: Mapping[str, object] | None = None) -> object:
    positional, keywords = example.arguments(example.rows.tensors())
    try:
        with torch.no_grad():
            return module(*positional, **keywords, **(extra or {}))
    except Exception as error:  # the module's own code may raise anything
        where = line_of_error(error)
        raise UsageError(
            f"forward of {type(module).__name__} fails on the example inputs with {type(error).__name__}: "
            f"{error!s:.500}{f' ({where})' if where else ''}. Pass example inputs that it accepts"
        ) from error


def _read_answer(answer: object, rows: int, asked: Sequence[str] | None) -> ForwardForm:
    if isinstance(answer, Mapping | tuple | list) and not answer:
        raise UsageError(
            f"forward returns no predictions, but an empty {type(answer).__qualname__}, expected a tensor per task"
        )
    if isinstance(answer, Mapping):
        return _mapping(answer, rows, asked)
    if isinstance(answer, tuple | list) and not _is_with_aux(answer):
        for index, value in enumerate(answer):
            _check_tensor(value, rows, f"element {index} of what forward returns")
        fields = getattr(answer, "_fields", None)  # of a NamedTuple
        names = name_tasks(len(answer), asked=asked, in_file=fields, holder=_ANSWER)
        return ForwardForm("sequence", names, tuple(range(len(answer))))
    tensor = _first(answer, rows, "the answer")
    if asked is not None and len(asked) != 1 and (tensor.ndim != 2 or tensor.shape[1] == 1):
        raise UsageError(
            f"forward returns one tensor of shape {tuple(tensor.shape)}, which is one task, and there are {len(asked)} task "
            "names: give one, or have forward return a tuple or dict of tensors, one per task (y.unbind(1) takes an axis of "
            "tasks apart)"
        )
    if tensor.ndim != 2 or tensor.shape[1] == 1 or (asked is not None and len(asked) == 1):
        return ForwardForm("tensor", name_tasks(1, asked=asked, in_file=None), (0,))
    count = tensor.shape[1]
    if asked is not None and len(asked) != count:
        raise UsageError(
            f"forward returns one tensor of {count} columns, and there are {len(asked)} task names: give {count} names "
            "where each column is a task, or one where they are the outputs of one task"
        )
    note = (
        f"forward returns one tensor of {count} columns, taken as {count} tasks; for one task of {count} outputs pass "
        "one task name"
    )
    notes = () if asked is not None else (note,)
    return ForwardForm("columns", name_tasks(count, asked=asked, in_file=None), tuple(range(count)), notes)


def _mapping(answer: Mapping[object, object], rows: int, asked: Sequence[str] | None) -> ForwardForm:
    keys = list(answer)
    for key in keys:
        _check_tensor(answer[key], rows, f"{key!r} of what forward returns")
    if asked is not None and sorted(asked) == sorted(map(str, keys)):
        by_name = {str(key): key for key in keys}
        return ForwardForm("mapping", tuple(asked), tuple(by_name[name] for name in asked))
    if asked is not None and {*asked} & {*map(str, keys)}:
        raise UsageError(
            f"the task names are {', '.join(asked)}, and forward returns {', '.join(map(str, keys))}: give the same names, "
            "in the order wanted, or other names for all"
        )
    names = name_tasks(len(keys), asked=asked, in_file=[str(key) for key in keys], holder=_ANSWER)
    return ForwardForm("mapping", names, tuple(keys))


def _is_with_aux(answer: Sequence[object]) -> bool:
    """(tensor, aux dict): the prediction and what it was made from."""
    return len(answer) >= 2 and isinstance(answer[0], Tensor) and not isinstance(answer[1], Tensor)


def _first(answer: object, rows: int, what: str) -> Tensor:
    value = answer[0] if isinstance(answer, tuple | list) and answer else answer
    return _check_tensor(value, rows, what)


def _check_tensor(value: object, rows: int, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise UsageError(
            f"{what} is {type(value).__qualname__}, expected a tensor of a row for each row of the input: have forward "
            "return tensors, one per task"
        )
    if value.ndim == 0 or value.shape[0] != rows:
        raise UsageError(
            f"{what} has shape {tuple(value.shape)} for {rows} rows, expected the batch axis first: return a row for "
            "each row of the input"
        )
    if not value.numel():
        raise UsageError(
            f"{what} has shape {tuple(value.shape)}, which holds no numbers, expected at least one a row: return scores "
            "for each row of the input"
        )
    if not value.is_floating_point():
        raise UsageError(
            f"{what} is {value.dtype}, expected floats: return scores or probabilities, and take the arg-max of what the "
            "bundle answers"
        )
    return value

"""The tasks that a caller asks for, checked against those there are."""

from __future__ import annotations

from collections.abc import Sequence

from te_runtime.errors import InputError

__all__ = ["check_tasks"]


def check_tasks(tasks: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The tasks that a caller asked for.

    Args:
        tasks: what the caller passed.
        known: the names of the model's tasks.

    Raises:
        InputError: no names, a name twice, or one that is not known.
    """
    if isinstance(tasks, str):
        raise InputError(f"tasks: got the text {tasks!r:.80}, expected a list of names: pass [{tasks!r:.80}]")
    try:
        chosen = list(tasks)
    except TypeError as error:
        raise InputError(f"tasks: found {tasks!r:.80}, expected a list of names") from error
    if not chosen:
        raise InputError(
            f"tasks is empty: leave it out for all tasks, or name some of {', '.join(known):.400}"
        )
    for task in chosen:
        if not isinstance(task, str):
            raise InputError(f"tasks: found {task!r:.80} among them, expected names: {', '.join(known):.400}")
        if task not in known:
            import difflib  # here, because only a mistake needs it

            near = difflib.get_close_matches(str(task), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"unknown task {task!r:.80}: {hint}The tasks are {', '.join(known):.400}")
        if chosen.count(task) > 1:
            raise InputError(f"task {task!r} is asked for twice, expected each name once")
    return tuple(chosen)

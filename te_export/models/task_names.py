"""Which tasks are exported, and under which names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from te_export.errors import UsageError
from te_runtime.manifest import is_task_name

__all__ = ["name_tasks", "select_tasks"]


def name_tasks(
    count: int,
    *,
    asked: Sequence[str] | None,
    in_file: Sequence[str] | None,
    holder: str = "the checkpoint",
) -> tuple[str, ...]:
    """Names for all tasks of a checkpoint: those asked for, else those in the file, else task_0, task_1, …

    Args:
        holder: what has the tasks and their names, for messages.

    Raises:
        UsageError: the number of names is wrong, a name is not allowed, or two names differ only by case.
    """
    names = tuple(asked or in_file or (f"task_{index}" for index in range(count)))
    source = "--task-names" if asked else f"task_names in {holder}"
    if len(names) != count:
        raise UsageError(
            f"{source} gives {len(names)} names ({', '.join(names[:8])}{', …' if len(names) > 8 else ''}), "
            f"but {holder} has {count} task{'s' if count != 1 else ''}. Give one name per task: --task-names a,b,c"
        )
    for name in names:
        if not is_task_name(name):
            raise UsageError(
                f"{source}: {name!r:.90} is not allowed as a task name: expected 1 to 64 letters, digits, "
                "'_' or '-'. "
                "Give other names with --task-names a,b,c"
            )
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other is not name or names.count(name) > 1:
            raise UsageError(
                f"{source}: {other!r} and {name!r} are the same name when case is ignored; file names need "
                "them apart. "
                "Give other names with --task-names a,b,c"
            )
    return names


def select_tasks(names: Sequence[str], asked: Sequence[str] | None) -> tuple[int, ...]:
    """Indices of the tasks asked for, in the order asked; all where nothing was asked.

    Raises:
        UsageError: a name is unknown (with the nearest one) or stands twice.
    """
    if asked is None:
        return tuple(range(len(names)))
    if not asked:
        raise UsageError("no task to export: name at least one, or none at all for every task")
    for name in asked:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            shown = ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
            raise UsageError(
                f"--task {name!r:.90}: there is no such task. {hint}Tasks of this checkpoint: {shown}"
            )
    if len(set(asked)) != len(asked):
        twice = next(name for name in asked if list(asked).count(name) > 1)
        raise UsageError(f"--task {twice!r} is given twice; give each task once")
    return tuple(list(names).index(name) for name in asked)

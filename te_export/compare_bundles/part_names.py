"""Many parts of a model in few words: `experts 0 to 7`, `gates and heads of click, buy`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

from te_export.compare_bundles.text_layout import some

__all__ = ["gathered"]

_EXPERT = re.compile(r"expert (\d+)")
_OF_TASK = re.compile(r"(gate|head) of (\S+)")


def gathered(parts: Iterable[tuple[str, str]]) -> list[str]:
    """Phrases for parts, each with a remark to put after it; those of one kind with one remark together."""
    found: list[str] = []
    waiting = list(parts)
    for kind, group in groupby(waiting, key=lambda part: (_kind(part[0]), part[1])):
        names = [name for name, _ in group]
        if kind[0] == "expert":
            found += [f"{phrase}{kind[1]}" for phrase in _experts(names)]
        elif kind[0] != "of task":
            found += [f"{name}{kind[1]}" for name in names]
    return found + _of_tasks([(name, remark) for name, remark in waiting if _kind(name) == "of task"])


def _kind(name: str) -> str:
    if _EXPERT.fullmatch(name):
        return "expert"
    return "of task" if _OF_TASK.fullmatch(name) else "other"


def _experts(names: Sequence[str]) -> list[str]:
    """Runs of numbers that follow one another."""
    numbers = [int(name.removeprefix("expert ")) for name in names]
    runs = groupby(enumerate(numbers), key=lambda entry: entry[1] - entry[0])
    found = []
    for _, run in runs:
        own = [number for _, number in run]
        found.append(f"expert {own[0]}" if len(own) == 1 else f"experts {own[0]} to {own[-1]}")
    return found


def _of_tasks(parts: Iterable[tuple[str, str]]) -> list[str]:
    """Tasks of which the same is told together."""
    told: dict[str, list[tuple[str, str]]] = {}
    for name, remark in parts:
        found = _OF_TASK.fullmatch(name)
        assert found is not None  # the caller chose them by it
        told.setdefault(found[2], []).append((found[1], remark))
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for task, own in told.items():
        alike.setdefault(tuple(own), []).append(task)
    return [phrase for own, tasks in alike.items() for phrase in _phrases(own, tasks)]


def _phrases(own: Sequence[tuple[str, str]], tasks: Sequence[str]) -> list[str]:
    """Gate and head in one phrase, or in two where the remarks differ."""
    plural = "s" if len(tasks) > 1 else ""
    kinds: dict[str, list[str]] = {}
    for kind, remark in own:
        kinds.setdefault(remark, []).append(f"{kind}{plural}")
    return [f"{' and '.join(names)} of {some(tasks)}{remark}" for remark, names in kinds.items()]

"""What a bundle is compared with: another bundle, or another precision or mode of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from te_runtime.bench_options import LoadOptions, Other
from te_runtime.bench_rows import BenchRows
from te_runtime.errors import InputError
from te_runtime.inputs import shown_shape

if TYPE_CHECKING:
    from te_runtime.bench_subject import Subject
    from te_runtime.manifest import TensorSpec

__all__ = ["check_comparable", "check_different", "resolve_other"]


def resolve_other(path: Path, load: LoadOptions, other: Other) -> tuple[Path, LoadOptions]:
    """Where the second one is and how to load it: as the first one, but for what was asked for."""
    precision = load.precision if other.precision is None else other.precision
    changed = replace(load, precision=precision, mode=load.mode if other.mode is None else other.mode)
    return path if other.path is None else other.path, changed


def check_comparable(rows: BenchRows, other: BenchRows) -> None:
    """Make sure that two bundles can be given the same rows for the same tasks.

    Args:
        rows: of the first bundle, with the tasks asked for.
        other: of the second, with all of its tasks.

    Raises:
        InputError: their inputs differ in more than their order and the names of open axes, or the second has not
            all the tasks.
    """
    if _read(rows) != _read(other):
        raise InputError(
            f"--compare: the other bundle reads {_shown(other)}, this one {_shown(rows)}, and pairs of calls need "
            "the same rows: run each bundle by itself"
        )
    missing = [task for task in rows.tasks if task not in other.tasks]
    if missing:
        raise InputError(
            f"--compare: the other bundle has no task {missing[0]!r}; its tasks are {', '.join(other.tasks):.400}. "
            "Name tasks that both have with --task"
        )


def check_different(subjects: Sequence[Subject], other: Other | None) -> None:
    """Make sure that a bundle is not compared with itself by mistake; --compare may name it on purpose.

    Raises:
        InputError: both ran the same variant in the same mode.
    """
    if other is None or other.path is not None:
        return
    runs = [(subject.precision, subject.plan.mode) for subject in subjects]
    if runs[0] == runs[1]:
        precision, mode = runs[0]
        raise InputError(
            f"--compare-precision, --compare-mode: both would run {precision} in mode {mode} of {subjects[0].path}. "
            "Name another one, or choose the first with --precision or --mode; to see how much the machine makes of "
            "no difference at all, pass the bundle itself to --compare"
        )


def _read(rows: BenchRows) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    return {spec.name: (spec.dtype, _fixed(spec)) for spec in rows.inputs}


def _fixed(spec: TensorSpec) -> tuple[int | None, ...]:
    """The shape with None for an open axis, whatever its name."""
    return tuple(axis if isinstance(axis, int) else None for axis in spec.shape)


def _shown(rows: BenchRows) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {shown_shape(spec.shape)}" for spec in rows.inputs)

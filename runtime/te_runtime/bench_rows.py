"""The rows that a benchmark predicts for: a bundle's ordinary golden rows, which fit any model, over and over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from te_runtime.bundle import open_bundle
from te_runtime.golden_rows import read_golden_rows, take_rows
from te_runtime.manifest import TensorSpec
from te_runtime.task_choice import check_tasks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from te_runtime.manifest import RowGroup

__all__ = ["BenchRows", "cut_queries", "read_bench_rows"]

_ORDINARY = "ordinary"
Feeds = Mapping[str, "NDArray[np.generic]"]


@dataclass(frozen=True)
class BenchRows:
    """Rows of a bundle.

    Attributes:
        inputs: what the model reads.
        feeds: input name → array of `count` rows.
        group: name of the golden rows that they are.
        count: how many there are.
        tasks: the tasks asked for, or all of them.
    """

    inputs: tuple[TensorSpec, ...]
    feeds: Feeds
    group: str
    count: int
    tasks: tuple[str, ...]


def read_bench_rows(path: Path, tasks: tuple[str, ...] | None) -> BenchRows:
    """Read the ordinary golden rows of a bundle, or its first group where it has no ordinary ones.

    Raises:
        BundleError: no bundle there, or its golden rows cannot be used.
        InputError: a task is not known or asked for twice.
    """
    bundle = open_bundle(path, check="size")
    manifest = bundle.manifest
    chosen = manifest.task_names if tasks is None else check_tasks(tasks, manifest.task_names)
    golden = read_golden_rows(bundle, manifest.variants[0])
    number = _ordinary(manifest.golden.groups)
    group, start = manifest.golden.groups[number], golden.group_starts[number]
    feeds = take_rows(golden, np.arange(start, start + group.rows))
    return BenchRows(manifest.inputs, feeds, group.name, group.rows, chosen)


def cut_queries(rows: BenchRows, rows_per_query: int) -> list[dict[str, NDArray[np.generic]]]:
    """Feeds of queries that go through the rows in order, repeating them; at most as many as there are rows."""
    count = max(1, rows.count // rows_per_query)
    starts = range(0, count * rows_per_query, rows_per_query)
    return [
        {
            name: np.ascontiguousarray(array[np.arange(start, start + rows_per_query) % rows.count])
            for name, array in rows.feeds.items()
        }
        for start in starts
    ]


def _ordinary(groups: tuple[RowGroup, ...]) -> int:
    return next((number for number, group in enumerate(groups) if group.name == _ORDINARY), 0)

"""Graphs are timed for a moment only: these tests are of what is built, not of how fast it is."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from te_export.precision import variants
from te_export.precision.latency import measure_ratios
from te_export.pruning import prune_tasks


@pytest.fixture(scope="module", autouse=True)
def _timed_for_a_moment() -> Iterator[None]:
    quick = functools.partial(measure_ratios, seconds=0.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "measure_ratios", quick)
        patch.setattr(prune_tasks, "_SECONDS", 0.02)
        yield

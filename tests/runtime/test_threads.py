from __future__ import annotations

import os
from pathlib import Path

import pytest

import te_runtime
from te_runtime.errors import InputError
from te_runtime.threads import default_threads, parse_threads, usable_cpus


def test_threads() -> None:
    assert parse_threads(3) == 3
    assert parse_threads(None) == default_threads()
    assert 1 <= default_threads() <= 4
    for wrong in (0, -1, 1025, True, 1.0, "2"):
        with pytest.raises(InputError, match="expected a whole number from 1 to 1024"):
            parse_threads(wrong)


def test_spinning_is_true_or_false(pristine: Path) -> None:
    for wrong in (1, None, "yes"):
        with pytest.raises(InputError, match="expected True or False"):
            te_runtime.load(pristine, spinning=wrong)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity, which Linux has")
def test_cpus_that_this_process_may_not_use_do_not_count() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cpus() == 1
        assert default_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert usable_cpus() == len(allowed)

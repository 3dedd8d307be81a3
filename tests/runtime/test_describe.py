from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from te_runtime.describe import run_text, shown_bytes
from te_runtime.prediction import Prediction
from te_runtime.providers import ProviderChoice


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (8_123_000, "8.1 MB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert shown_bytes(size_bytes) == text


def test_long_rows_and_many_rows_are_cut() -> None:
    choice = ProviderChoice("auto", "cpu", "no CUDA here: no driver", None)
    lines = list(run_text({"a": Prediction(np.ones((100, 20)), None)}, Path("o.npz"), choice))
    assert lines[0] == "a: prediction (100, 20)"
    assert lines[1].endswith("… 12 more")
    assert lines[4] == "  … 97 more rows"
    assert lines[5] == "Ran on cpu, chosen by auto: no CUDA here: no driver"
    assert len(lines) == 8

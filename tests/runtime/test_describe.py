from __future__ import annotations

import pytest

from te_runtime.describe import shown_bytes


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

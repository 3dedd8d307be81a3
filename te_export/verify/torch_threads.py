"""How many threads torch computes references with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["reference_threads"]

_SMALL_MODEL_BYTES = 256 * 10**6


@contextmanager
def reference_threads(parameter_bytes: int) -> Iterator[None]:
    """One thread for models under 256 MB, torch's own number for larger ones.

    Torch's threads wait for each other by spinning. On a machine whose cores are busy with something else, a
    small model on two threads was measured 20 to 30 times slower than on one; on an idle one, one thread
    costs
    a third of a second.
    """
    before = torch.get_num_threads()
    if parameter_bytes < _SMALL_MODEL_BYTES:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

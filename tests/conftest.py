"""What every test may rely on."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """Ctrl-C is heard: a shell that starts the suite in the background makes it, and its children, deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def operators_are_read_once() -> None:
    """For each export torch.onnx reads the sources of its operators anew, a third of a second; they do not change."""
    lazy = sys.modules.get("torch.onnx._internal._lazy_import")
    apis = getattr(lazy, "onnxscript_apis", None)
    if hasattr(apis, "get_torchlib_ops") and not hasattr(apis.get_torchlib_ops, "cache_info"):
        apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)

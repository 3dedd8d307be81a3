"""The scheduler's threads outlive what callers' callbacks raise in them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["surviving"]


@contextmanager
def surviving() -> Iterator[None]:
    """Tell whatever is raised within as the end of a thread would be told, by threading.excepthook, and go on.

    concurrent.futures logs a callback's Exception; what is none, such as sys.exit() raises, would end an executor in
    silence, and the requests after it would wait for nobody.
    """
    try:
        yield
    except BaseException:  # noqa: BLE001 - told here
        kind, error, trace = sys.exc_info()
        assert kind is not None
        threading.excepthook(threading.ExceptHookArgs((kind, error, trace, threading.current_thread())))

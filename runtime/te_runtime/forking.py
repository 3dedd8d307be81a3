"""What a forked child must not touch, so that it gets an error instead of a hang.

Threads do not survive a fork, and ONNX Runtime waits for its own: a run hangs, letting go of a session hangs,
and so does an ordinary exit of the child once onnxruntime was imported before the fork (seen with 1.31.1, in a
destructor that C's exit calls). So in a child every loaded model is marked, what it loaded is never released
there, and the child's exit ends with C's _exit: after Python has shut down as ever, and before destructors of
libraries run.

A fork also waits until no other thread is loading: the child would inherit locks of ONNX Runtime and of Python's
imports that a thread holds which is not there any more.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["holding_back_forks", "watch_forks"]


class _Forkable(Protocol):
    def forked(self) -> object:
        """Stop working; return what must live as long as the process."""


class _Gate:
    """Loading holds forks back, and a fork holds back loading that has not begun."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._loading: list[int] = []
        self._forking = 0

    @contextmanager
    def loading(self) -> Iterator[None]:
        own = threading.get_ident()
        with self._changed:
            while self._forking and own not in self._loading:
                self._changed.wait()
            self._loading.append(own)
        try:
            yield
        finally:
            with self._changed:
                self._loading.remove(own)
                self._changed.notify_all()

    def before_fork(self) -> None:
        own = threading.get_ident()
        with self._changed:
            self._forking += 1
            while any(thread != own for thread in self._loading):
                self._changed.wait()

    def after_fork_in_parent(self) -> None:
        with self._changed:
            self._forking -= 1
            self._changed.notify_all()

    def after_fork_in_child(self) -> None:
        """Only the forking thread is here: locks that others held are left behind."""
        own = threading.get_ident()
        self._changed = threading.Condition(threading.Lock())
        self._loading = [thread for thread in self._loading if thread == own]
        self._forking = 0


# The interpreter offers one hook per process that cannot be taken back, hence one set per process.
_watched: weakref.WeakSet[_Forkable] = weakref.WeakSet()
_gate = _Gate()


def holding_back_forks() -> AbstractContextManager[None]:
    """While it is open, os.fork in other threads waits."""
    return _gate.loading()


def watch_forks(model: _Forkable) -> None:
    """Call `model.forked()` in every child that is forked while `model` lives."""
    _watched.add(model)


def _after_fork_in_child() -> None:
    _gate.after_fork_in_child()
    if "onnxruntime" not in sys.modules:
        return
    import ctypes  # here, because only a forked child needs it

    for model in tuple(_watched):
        kept = ctypes.py_object(model.forked())
        ctypes.pythonapi.Py_IncRef(kept)  # one reference that nobody gives back, not even at exit
    _watched.clear()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):  # glibc; it runs what was registered last first, with the exit status
        libc.on_exit(libc._exit, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_gate.before_fork,
        after_in_parent=_gate.after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )

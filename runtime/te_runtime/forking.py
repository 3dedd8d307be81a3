"""What a forked child must not touch, so that it gets an error instead of a hang.

Threads do not survive a fork, and ONNX Runtime waits for its own: a run hangs, letting go of a session hangs,
and so does an ordinary exit of the child once onnxruntime was imported before the fork (seen with 1.31.1, in a
destructor that C's exit calls). So in a child every loaded model is marked, what it loaded is never released
there, and the child's exit ends with C's _exit: after Python has shut down as ever, and before destructors of
libraries run.
"""

from __future__ import annotations

import os
import sys
import weakref
from typing import Protocol

__all__ = ["watch_forks"]


class _Forkable(Protocol):
    def forked(self) -> object:
        """Stop working; return what must live as long as the process."""


# The interpreter offers one hook per process that cannot be taken back, hence one set per process.
_watched: weakref.WeakSet[_Forkable] = weakref.WeakSet()


def watch_forks(model: _Forkable) -> None:
    """Call `model.forked()` in every child that is forked while `model` lives."""
    _watched.add(model)


def _after_fork_in_child() -> None:
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
    os.register_at_fork(after_in_child=_after_fork_in_child)

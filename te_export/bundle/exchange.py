"""Exchanging two folders, in one system call where the platform has one."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

__all__ = ["exchange_folders"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # sys/stdio.h on macOS


def exchange_folders(new: Path, old: Path) -> None:
    """Afterwards `old` names what `new` named. What `old` named is at `new`, or gone where that took two
    renames.

    Raises:
        OSError: neither way worked; both folders are as they were.
    """
    if _exchange_at_once(new, old):
        return
    aside = new.with_name(new.name + "-old")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


def _exchange_at_once(first: Path, second: Path) -> bool:
    """Whether the kernel exchanged the two names; False where it cannot on this platform or file system."""
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    names = (os.fsencode(first), os.fsencode(second))
    if sys.platform.startswith("linux") and hasattr(libc, "renameat2"):
        assert libc is not None  # posix
        done: int = libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE))
        return done == 0
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        assert libc is not None  # posix
        done = libc.renamex_np(names[0], names[1], ctypes.c_uint(_RENAME_SWAP))
        return done == 0
    return False

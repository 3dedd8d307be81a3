"""How much memory this process holds, where the system tells its own share."""

from __future__ import annotations

from pathlib import Path

__all__ = ["read_pss_bytes"]

_ROLLUP = Path("/proc/self/smaps_rollup")


def read_pss_bytes(rollup: Path = _ROLLUP) -> int | None:
    """The process's proportional set size (PSS) in bytes: pages it shares with others count in part.

    Args:
        rollup: where Linux tells it; a test passes its own.

    Returns:
        None where the system does not tell, as outside Linux.
    """
    try:
        text = rollup.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "Pss":
            return int(value.split()[0]) * 1024
    return None

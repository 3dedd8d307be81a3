"""A graph that is loaded when it is first needed, so that a process holds the weights of what it asks for and no more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from te_runtime.forking import holding_back_forks
from te_runtime.side_by_side import side_by_side

if TYPE_CHECKING:
    from te_runtime.manifest import GraphSpec
    from te_runtime.session_types import Session

__all__ = ["DeferredSession", "load_all"]

S = TypeVar("S", bound="Session")


class DeferredSession(Generic[S]):
    """A session that is loaded once, by the first thread that needs it."""

    __slots__ = ("_load", "_lock", "_session", "spec")

    def __init__(self, spec: GraphSpec, load: Callable[[], S]) -> None:
        """Defer a session.

        Args:
            spec: what the graph reads and gives.
            load: gives the session; it is called on any thread, and again after it has raised.
        """
        self.spec = spec
        self._load = load
        self._lock = (
            threading.RLock()
        )  # a signal handler may predict while the thread it interrupts is in here
        self._session: S | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._session is not None

    def get(self) -> S:
        """The session.

        Raises:
            BundleError, ProviderError: it cannot be loaded.
        """
        return self._session or load_all([self])[0]

    def load(self) -> S:
        """As get, for callers that hold back forks already."""
        with self._lock:
            if self._session is None:
                self._session = self._load()
            return self._session


def load_all(deferred: Sequence[DeferredSession[S]]) -> list[S]:
    """The sessions of all, those that are not loaded yet side by side.

    Raises:
        BundleError, ProviderError: one of them cannot be loaded; the others are kept.
    """
    waiting = [session for session in deferred if not session.is_loaded]
    if waiting:
        with (
            holding_back_forks()
        ):  # here alone: threads that wait for a fork, which waits for this one, would never end
            side_by_side([session.load for session in waiting])
    return [session.load() for session in deferred]

from __future__ import annotations

import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from te_runtime.deferred_session import DeferredSession, load_all
from te_runtime.errors import BundleError
from te_runtime.manifest import GraphSpec, TensorSpec

SPEC = GraphSpec("fp32/tail-a.onnx", (TensorSpec("h", "float32", ("batch", 3)),), ())


class FakeSession:
    """A Session that is never run."""

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec

    def run(self, feeds: object) -> list[object]:
        raise AssertionError(feeds)


def counted(loads: list[int], seconds: float = 0.0) -> DeferredSession[FakeSession]:
    """A session that keeps in `loads` on which thread it was loaded."""

    def load() -> FakeSession:
        loads.append(threading.get_ident())
        time.sleep(seconds)
        return FakeSession(SPEC)

    return DeferredSession(SPEC, load)


def test_nothing_is_loaded_before_it_is_needed_and_then_once() -> None:
    loads: list[int] = []
    session = counted(loads)
    assert (session.spec, session.is_loaded, loads) == (SPEC, False, [])
    first = session.get()
    assert session.is_loaded
    assert session.get() is first
    assert session.load() is first
    assert load_all([session, session]) == [first, first]
    assert loads == [threading.get_ident()]


def test_threads_that_come_at_once_get_the_one_session() -> None:
    loads: list[int] = []
    sessions = [counted(loads, seconds=0.01) for _ in range(3)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: load_all(sessions), range(16)))
    assert len(loads) == 3
    assert all(entry == found[0] for entry in found)


def test_what_failed_is_tried_again_and_what_loaded_is_kept() -> None:
    loads: list[int] = []
    good, attempts = counted(loads), []

    def load() -> FakeSession:
        attempts.append(1)
        if len(attempts) == 1:
            raise BundleError("fp32/tail-b.onnx: onnxruntime refuses it")
        return FakeSession(SPEC)

    bad = DeferredSession(SPEC, load)
    with pytest.raises(BundleError, match="refuses it"):
        load_all([good, bad])
    assert not bad.is_loaded
    assert load_all([good, bad])[1] is bad.get()
    assert (len(loads), len(attempts)) == (1, 2)


def test_loading_may_ask_for_what_is_being_loaded_as_a_signal_handler_does() -> None:
    sessions: list[DeferredSession[FakeSession]] = []

    def load() -> FakeSession:
        if not nested:
            nested.append(1)
            sessions[0].get()
        return FakeSession(SPEC)

    nested: list[int] = []
    sessions.append(DeferredSession(SPEC, load))
    assert sessions[0].get() is sessions[0].get()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which Linux and macOS have")
def test_a_fork_waits_until_loading_is_done() -> None:
    """Without that, the child would inherit locks that a thread holds which is not there any more."""
    begun, events = threading.Event(), []

    def load() -> FakeSession:
        begun.set()
        time.sleep(0.1)
        events.append("loaded")
        return FakeSession(SPEC)

    thread = threading.Thread(target=load_all, args=([DeferredSession(SPEC, load), counted([])],))
    thread.start()
    begun.wait()
    with warnings.catch_warnings():  # from Python 3.12 on, forking a process with threads warns
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os._exit(0)
    events.append("forked")
    os.waitpid(pid, 0)
    thread.join()
    assert events == ["loaded", "forked"]

"""Nodes really run on the provider asked for, by ONNX Runtime's own profile of the sessions that load() opens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import te_runtime
from te_runtime.bundle import open_bundle
from te_runtime.open_device import open_device_executor
from te_runtime.providers import execution_provider

PROVIDERS = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


class Profiled:
    """Has every session that is opened write a profile; tells which providers its nodes ran on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.sessions: list[onnxruntime.InferenceSession] = []
        real = onnxruntime.InferenceSession
        numbers = itertools.count()  # sessions are opened side by side

        def open_session(path: str, options: onnxruntime.SessionOptions, **others: object) -> object:
            options.enable_profiling = True
            options.profile_file_prefix = str(folder / f"profile-{next(numbers)}")
            session = real(path, options, **others)
            self.sessions.append(session)
            return session

        monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)

    def providers(self) -> dict[str, set[str]]:
        """Node → the providers that it ran on, of the sessions in which any node ran."""
        found: dict[str, set[str]] = {}
        for number, session in enumerate(self.sessions):
            for event in json.loads(Path(session.end_profiling()).read_text()):
                provider = event.get("args", {}).get("provider")
                if event.get("cat") == "Node" and provider:
                    found.setdefault(f"{number}/{event['name']}", set()).add(provider)
        return found


@pytest.mark.parametrize("mode", ["joint", "split", "task"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_nodes_ran_on_the_provider_asked_for(
    pristine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    provider: str,
    mode: str,
) -> None:
    if provider == "cuda":
        request.getfixturevalue("gpu")
    with te_runtime.load(pristine, provider=provider, mode=mode) as warm:  # the probe runs unprofiled
        assert warm.provider == provider
    profiled = Profiled(monkeypatch, tmp_path)
    bundle = open_bundle(pristine)
    executor = open_device_executor(bundle, bundle.manifest.variants[0], mode, provider=provider, threads=1)
    executor.run({"x": np.ones((3, 6), dtype=np.float32)}, 3, bundle.manifest.task_names)
    ran = profiled.providers()
    assert ran
    assert set().union(*ran.values()) == {execution_provider(provider)}, ran


def test_load_for_the_cpu_runs_there(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profiled = Profiled(monkeypatch, tmp_path)
    model = te_runtime.load(pristine, threads=1)
    model.predict(np.ones((3, 6)))
    assert set().union(*profiled.providers().values()) == {"CPUExecutionProvider"}
    assert len(profiled.sessions) == 2  # trunk and joint tails

"""The code that runs bundles on a GPU, on the CPU: the same bindings, values and order of runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from te_runtime.bundle import open_bundle
from te_runtime.cuda_graphs import GraphExecutor
from te_runtime.device_executor import DeviceExecutor
from te_runtime.errors import BundleError, InputError
from te_runtime.executor import Executor, open_executor
from te_runtime.open_device import open_device_executor
from te_runtime.providers import CudaOptions
from te_runtime.session import OrtSession
from te_runtime.task_mode import TaskModeExecutor

MODES = ("joint", "split", "task")
RECORDED = (1, 4)
# Plain, recorded: batches of 1 and 4 rows keep their values, others are made anew.
KINDS = {"plain": CudaOptions(), "recorded": CudaOptions(graph_batch_sizes=RECORDED)}


@pytest.fixture(
    scope="module", params=["one input", "two inputs", "no gate", "gates read inputs", "no trunk"]
)
def root(request: pytest.FixtureRequest, tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {
        "one input": {},
        "two inputs": {"two_inputs": True},
        "no gate": {"gated": False},
        "gates read inputs": {"gates_read_inputs": True, "two_inputs": True},
        "no trunk": {"trunk": False, "two_inputs": True},
    }
    path = tmp_path_factory.mktemp("device") / "tiny-onnx"
    tiny.write_tiny_bundle(path, **options[request.param])
    return path


def feeds(root: Path, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    specs = open_bundle(root).manifest.inputs
    return {spec.name: rng.normal(size=(rows, *spec.shape[1:])).astype(spec.dtype) for spec in specs}


def on_device(root: Path, mode: str, options: CudaOptions) -> Executor:
    bundle = open_bundle(root)
    return open_device_executor(
        bundle, bundle.manifest.variants[0], mode, provider="cpu", threads=1, cuda=options
    )


def plain(root: Path, mode: str) -> Executor:
    bundle = open_bundle(root)
    return open_executor(bundle, bundle.manifest.variants[0], mode, provider="cpu", threads=1)


def assert_equal(found: dict[str, object], expected: dict[str, object]) -> None:
    assert list(found) == list(expected)
    for task, prediction in expected.items():
        np.testing.assert_array_equal(found[task].output, prediction.output)
        if prediction.routing_weights is None:
            assert found[task].routing_weights is None
        else:
            np.testing.assert_array_equal(found[task].routing_weights, prediction.routing_weights)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_are_those_of_the_plain_executor(root: Path, mode: str, kind: str) -> None:
    device, reference = on_device(root, mode, KINDS[kind]), plain(root, mode)
    waits = mode == "task" and open_bundle(root).manifest.variants[0].trunk is not None
    assert type(device) is (
        GraphExecutor if kind == "recorded" else TaskModeExecutor if waits else DeviceExecutor
    )
    for rows in (1, 4, 3, 1, 0, 4):
        for tasks in (["task_0", "task_1"], ["task_1"]):
            values = feeds(root, rows, seed=rows)
            assert_equal(device.run(values, rows, tasks), reference.run(values, rows, tasks))


@pytest.mark.parametrize("kind", KINDS)
def test_mode_task_has_one_trunk_on_the_device(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where batches are recorded everything is loaded at once, so that one task has no graph of its own either."""
    ran = count_runs(monkeypatch)
    device = on_device(root, "task", KINDS[kind])
    ran.clear()
    for tasks in (["task_0"], ["task_0", "task_1"], ["task_0"]):
        device.run(feeds(root, 4), 4, tasks)
    trunk, first, second = (f"fp32/{name}.onnx" for name in ("trunk", "tail-task_0", "tail-task_1"))
    own = [f"fp32/task-task_{number}.onnx" for number in range(2)]
    if open_bundle(root).manifest.variants[0].trunk is None:
        assert ran == [own[0], *own, own[0]]
    else:
        alone = own[:1] if kind == "plain" else [trunk, first]
        assert ran == [*alone, trunk, first, second, trunk, first]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_stay_as_they_were_after_the_next_call(root: Path, kind: str) -> None:
    device = on_device(root, "split", KINDS[kind])
    first = device.run(feeds(root, 4, seed=1), 4, ["task_0"])["task_0"].output
    kept = first.copy()
    second = device.run(feeds(root, 4, seed=2), 4, ["task_0"])["task_0"].output
    np.testing.assert_array_equal(first, kept)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_may_share_it(root: Path, kind: str) -> None:
    device, reference = on_device(root, "split", KINDS[kind]), plain(root, "split")
    tasks = ["task_0", "task_1"]
    expected = {seed: reference.run(feeds(root, 1 + seed, seed), 1 + seed, tasks) for seed in range(4)}

    def work(seed: int) -> None:
        for _ in range(50):
            assert_equal(device.run(feeds(root, 1 + seed, seed), 1 + seed, tasks), expected[seed])

    with ThreadPoolExecutor(len(expected)) as pool:
        list(pool.map(work, expected))  # raises what a thread raised


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ran: list[str] = []
    real: Callable[..., None] = OrtSession.run_bound

    def run_bound(self: OrtSession, binding: object, run_options: object = None) -> None:
        ran.append(self.spec.path)
        real(self, binding, run_options)

    monkeypatch.setattr(OrtSession, "run_bound", run_bound)
    return ran


def in_split(root: Path, *tasks: str) -> list[str]:
    """What answers these tasks in mode split."""
    variant = open_bundle(root).manifest.variants[0]
    if variant.trunk is None:
        return [f"fp32/task-{task}.onnx" for task in tasks]
    if len(tasks) == len(variant.tasks):
        return ["fp32/trunk.onnx", "fp32/joint-tails.onnx"]
    return ["fp32/trunk.onnx", *(f"fp32/tail-{task}.onnx" for task in tasks)]


def recorded(root: Path) -> list[str]:
    """What runs to record one batch size: everything that any choice of tasks runs."""
    found = in_split(root, "task_0", "task_1")
    if "fp32/joint-tails.onnx" in found:
        found += in_split(root, "task_0") + in_split(root, "task_1")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_graph_runs_once_and_only_what_is_asked_for(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = count_runs(monkeypatch)
    split = on_device(root, "split", KINDS[kind])
    ran.clear()
    split.run(feeds(root, 4), 4, ["task_1"])
    assert ran == in_split(root, "task_1")
    ran.clear()
    split.run(feeds(root, 4), 4, ["task_1", "task_0"])
    assert ran == in_split(root, "task_1", "task_0")
    ran.clear()
    joint = on_device(root, "joint", KINDS[kind])
    ran.clear()
    joint.run(feeds(root, 4), 4, ["task_1", "task_0"])
    assert ran == ["fp32/joint.onnx"]
    ran.clear()
    split.run(feeds(root, 0), 0, ["task_1"])
    assert ran == []


def test_every_batch_size_is_recorded_while_loading_and_all_runs_share_one_thread(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = count_runs(monkeypatch)
    threads: set[str] = set()
    real = OrtSession.run_bound

    def run_bound(self: OrtSession, *arguments: object) -> None:
        threads.add(threading.current_thread().name)
        real(self, *arguments)

    monkeypatch.setattr(OrtSession, "run_bound", run_bound)
    split = on_device(root, "split", CudaOptions(graph_batch_sizes=(1, 8)))
    assert ran == 2 * recorded(root)
    callers = [threading.Thread(target=split.run, args=(feeds(root, 8), 8, ["task_0"])) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(ran) == 2 * len(recorded(root)) + 3 * len(in_split(root, "task_0"))
    assert threads == {"te_runtime-cuda_0"}


def test_a_graph_that_fails_is_named(root: Path) -> None:
    wrong = {name: array[:, :1].copy() for name, array in feeds(root, 2).items()}
    with pytest.raises(BundleError, match=r"fp32/joint\.onnx: failed while it ran"):
        on_device(root, "joint", CudaOptions()).run(wrong, 2, ["task_0"])


def test_recording_needs_every_axis_but_the_batch_fixed(root: Path) -> None:
    bundle = open_bundle(root)
    (first, *others) = bundle.manifest.inputs
    open_axis = first._replace(shape=("batch", "length"))
    manifest = bundle.manifest._replace(inputs=(open_axis, *others))
    with pytest.raises(InputError, match="'x' has the open axes batch, length"):
        open_device_executor(
            replace(bundle, manifest=manifest),
            manifest.variants[0],
            "split",
            provider="cpu",
            threads=1,
            cuda=CudaOptions(graph_batch_sizes=(1,)),
        )

"""Threads, forks, and memory. What could hang runs in a process of its own, with a timeout."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import te_runtime
from te_runtime import BundleError, ClosedError

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which Linux and macOS have")
needs_smaps = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc/self/smaps_rollup, which Linux has"
)

FORK = """
import os, sys, warnings
import numpy as np
import te_runtime
warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, forking a process with threads warns
x = np.zeros((64, 6), dtype=np.float32)
model = te_runtime.load(sys.argv[1], threads=2, mode=sys.argv[2])
closed = te_runtime.load(sys.argv[1], threads=2)
closed.close()
model.predict(x)
pid = os.fork()
if pid == 0:
    for use in (lambda: model.predict(x), model.verify, model.utilization, model.__enter__):
        try:
            use()
        except te_runtime.ClosedError as error:
            assert "before this process was forked" in str(error), error
            assert "te_runtime.load() again after the fork" in str(error), error
        else:
            raise SystemExit("no error in the child")
    model.close()
    if sys.argv[3] == "delete":
        del model
    with te_runtime.load(sys.argv[1], threads=2) as again:
        again.predict(x)
        assert again.utilization()["task_0"].rows == 64
    sys.exit(7)  # an ordinary exit, which takes everything down
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
model.predict(x)
assert model.utilization()["task_0"].rows == 128
print("parent goes on")
"""

MEMORY = """
import sys
import numpy as np
import te_runtime

def pss_bytes():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) * 1024

x = np.zeros((1, 6), dtype=np.float32)
with te_runtime.load(sys.argv[2]) as warm:  # a tiny model, so that onnxruntime itself is not counted
    warm.predict(x)
before = pss_bytes()
model = te_runtime.load(sys.argv[1], threads=1, mode=sys.argv[3])
for tasks in [*([task] for task in model.tasks), None] if sys.argv[3] == "task" else [None]:
    model.predict(x, tasks)
loaded = pss_bytes()
model.close()
after = pss_bytes()
print(loaded - before, loaded - after)
"""


FORK_WHILE_LOADING = """
import os, sys, threading, time, warnings
import te_runtime
warnings.simplefilter("ignore", DeprecationWarning)
stop = threading.Event()
def load_again_and_again():
    while not stop.is_set():
        te_runtime.load(sys.argv[1], threads=1).verify()
threads = [threading.Thread(target=load_again_and_again) for _ in range(2)]
for thread in threads:
    thread.start()
for number in range(15):
    time.sleep(0.003 * number)
    pid = os.fork()
    if pid == 0:
        te_runtime.load(sys.argv[1], threads=1).verify()
        os._exit(7)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 7, status
stop.set()
for thread in threads:
    thread.join()
print("every child loaded")
"""

INTERRUPTED = """
import os, signal, sys, threading, time
import te_runtime
te_runtime.load(sys.argv[1]).close()
def interrupt():
    time.sleep(float(sys.argv[2]))
    os.kill(os.getpid(), signal.SIGINT)
try:
    threading.Thread(target=interrupt).start()
    while True:
        te_runtime.load(sys.argv[1], threads=1)
except KeyboardInterrupt:
    print("interrupted")
"""


def run_python(code: str, *arguments: object) -> str:
    """What the code printed. A hang takes its forked children with it, since all of them are one group."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail(f"hangs: {code}")
    assert process.returncode == 0, errors
    return output


@needs_fork
@pytest.mark.parametrize(
    ("mode", "ending"), [("split", "keep"), ("split", "delete"), ("joint", "delete"), ("task", "delete")]
)
def test_a_forked_child_is_told_and_can_load_again(pristine: Path, mode: str, ending: str) -> None:
    assert run_python(FORK, pristine, mode, ending) == "parent goes on\n"


@needs_fork
def test_a_fork_waits_for_loads_in_other_threads(pristine: Path) -> None:
    assert run_python(FORK_WHILE_LOADING, pristine) == "every child loaded\n"


@pytest.mark.parametrize("delay_s", [0.0, 0.011, 0.023, 0.037, 0.052])
def test_an_interrupt_while_loading_ends_in_keyboard_interrupt(pristine: Path, delay_s: float) -> None:
    assert run_python(INTERRUPTED, pristine, delay_s) == "interrupted\n"


def test_a_model_cannot_be_copied_or_sent(pristine: Path) -> None:
    with te_runtime.load(pristine) as model:
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"cannot be copied, .*: call te_runtime\.load\(\) again"):
                attempt(model)


def test_verify_refuses_files_that_changed_since(bundle: Path, tmp_path: Path) -> None:
    model = te_runtime.load(bundle)
    path = bundle / "golden.npz"
    kept = path.read_bytes()
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"golden\.npz: sha256 .*the file was changed"):
        model.verify()
    path.write_bytes(kept)
    assert model.verify().ok
    shutil.copytree(bundle, tmp_path / "other")
    bundle.rename(tmp_path / "old")
    (tmp_path / "other").rename(bundle)
    with pytest.raises(BundleError, match="was replaced since it was opened"):
        model.verify()
    model.close()


@needs_smaps
@pytest.mark.parametrize("mode", ["joint", "split"])
def test_close_gives_memory_back(tiny: ModuleType, tmp_path: Path, mode: str) -> None:
    """80%: allocators keep some pages. The weights are 18 MB, far above what else a process does meanwhile."""
    tiny.write_tiny_bundle(tmp_path / "big", hidden=150_000, standalone=False)
    tiny.write_tiny_bundle(tmp_path / "small")
    taken, given_back = map(int, run_python(MEMORY, tmp_path / "big", tmp_path / "small", mode).split())
    assert taken > 5_000_000
    assert given_back >= 0.8 * taken


@needs_smaps
def test_mode_task_holds_every_weight_once_whatever_is_asked_for(tiny: ModuleType, tmp_path: Path) -> None:
    """A quarter more: allocators keep some pages of the first task's graph. The trunk is 18 MB, and tails are small."""
    tiny.write_tiny_bundle(tmp_path / "big", hidden=150_000, standalone=False)
    tiny.write_tiny_bundle(tmp_path / "small")
    joint, task = (
        int(run_python(MEMORY, tmp_path / "big", tmp_path / "small", mode).split()[0])
        for mode in ("joint", "task")
    )
    assert task <= 1.25 * joint


def test_answers_outlive_the_model(pristine: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, 6), dtype=np.float32)
    model = te_runtime.load(pristine, threads=1)
    found = model.predict(x)
    kept = {task: (output.copy(), weights.copy()) for task, (output, weights, _) in found.items()}
    model.close()
    del model
    with te_runtime.load(pristine, threads=1) as other:
        for _ in range(50):
            other.predict(x + 1)
    for task, (output, weights) in kept.items():
        np.testing.assert_array_equal(found[task].output, output)
        np.testing.assert_array_equal(found[task].routing_weights, weights)


@pytest.mark.parametrize("mode", ["joint", "split", "task"])
def test_many_threads_with_other_batches_and_tasks(pristine: Path, mode: str) -> None:
    x = np.random.default_rng(0).standard_normal((9, 6), dtype=np.float32)
    choices: list[list[str] | None] = [None, ["task_0"], ["task_1"], ["task_1", "task_0"]]
    jobs = [(1 + number % 9, choices[number % 4]) for number in range(36)]
    with te_runtime.load(pristine, threads=1, mode=mode) as model, ThreadPoolExecutor(8) as pool:
        alone = [model.predict(x[:rows], tasks) for rows, tasks in jobs]
        together = list(pool.map(lambda job: model.predict(x[: job[0]], job[1]), jobs * 20))
    for number, found in enumerate(together):
        expected = alone[number % len(jobs)]
        assert list(found) == list(expected)
        for task, (output, weights, _) in found.items():
            np.testing.assert_array_equal(output, expected[task].output)
            np.testing.assert_array_equal(weights, expected[task].routing_weights)


def test_closing_while_others_call_ends_in_answers_or_errors(pristine: Path) -> None:
    x = np.zeros((2, 6), dtype=np.float32)

    def call(model: te_runtime.Model) -> str:
        try:
            return "answer" if model.predict(x)["task_0"].output.shape == (2, 2) else "wrong"
        except ClosedError:
            return "closed"

    for _ in range(20):
        model = te_runtime.load(pristine, threads=1, check="size")
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(call, model) for _ in range(40)]
            model.close()
        assert {future.result() for future in calls} <= {"answer", "closed"}

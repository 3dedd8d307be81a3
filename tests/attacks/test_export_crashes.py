"""An export that replaces a bundle is stopped at every step and at random moments; the bundle is always whole.

One process imports everything, captures the model and computes the references once; each trial is a fork of it that
runs the command line with all the rest as it is: reading, writing, checking, publishing, cleaning up. A second such
process builds int8 too, whose graphs are tried out in a scratch folder before anything of it is written.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from te_export.models.task_expert import TaskExpertConfig, TaskExpertModel

ANY_LOSS = ("--max-accuracy-drop", "100")

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="needs fork and POSIX signals: Linux or macOS"
)

DRIVER = '''
import functools, json, os, resource, shutil, signal, sys, time
from pathlib import Path

import torch

from te_export import cli, pipeline
from te_export.precision import variants
from te_runtime.bundle import open_bundle
from te_runtime.errors import TeRuntimeError

torch.set_num_threads(1)
folder, flags = Path(sys.argv[1]), sys.argv[2:]
target = folder / "model-onnx"
plain_capture, plain_references, known = pipeline.capture, pipeline.evaluate_references, {}
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlsym"}


def once(function):
    """Its answer by a bias that differs between the two checkpoints; forks find it there."""

    def answer(model, rest):
        key = function.__name__, float(model.module.model.backbone.network[0].bias[0])
        if key not in known:
            known[key] = function(model, rest)
        return known[key]

    return answer


variants.measure_ratios = functools.partial(variants.measure_ratios, seconds=0.02)
pipeline.capture = once(plain_capture)
pipeline.evaluate_references = once(plain_references)


def run(arguments, prepare):
    """Run the command in a fork; its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        out = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.argv = ["te-export", *map(str, arguments)]
        prepare()
        cli.main()
    except SystemExit as left:
        code = left.code
    finally:
        os._exit(code)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_event(number, *signals):
    """Send signals to oneself when the number-th operation on files begins; count them in events.txt."""
    seen = 0
    count = open(folder / "events.txt", "w")

    def hook(event, arguments):
        nonlocal seen
        if event not in EVENTS or (event == "open" and ".model-onnx." not in str(arguments[0])):
            return
        seen += 1
        if number is None:
            print(event, *arguments[:1], file=count, flush=True)
        elif seen == number:
            for one in signals:
                os.kill(os.getpid(), one)

    sys.addaudithook(hook)


def state():
    try:
        return open_bundle(target).manifest_sha256
    except TeRuntimeError as error:
        return f"broken: {error}"


def siblings():
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def restore():
    for path in [*folder.glob(".model-onnx.*"), target]:
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(folder / "old", target)


def trial(kind, arguments, prepare, stop=None):
    child = run(arguments, prepare)
    if stop is not None:
        stop(child)
    code = ended(child)
    record = {"kind": kind, "code": code, "state": state(), "siblings": siblings()}
    record["output"] = (folder / "output.txt").read_text()
    print(json.dumps(record), flush=True)
    restore()


def main():
    old, new = folder / "a.pt", folder / "b.pt"
    for path in (old, new):
        plain_run = [path, "-q", "-o", folder / "warm", "--dry-run", *flags]
        # Once in this process, for the captures.
        sys.argv = ["te-export", *map(str, plain_run)]
        try:
            cli.main()
        except SystemExit as left:
            assert left.code == 0
    for name in ("SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    assert ended(run([old, "-q", "-o", folder / "old", *flags], lambda: None)) == 0
    restore()
    print(json.dumps({"old": state()}), flush=True)
    replace = [new, "-o", target, "--force", *flags]

    begun = time.monotonic()
    trial("undisturbed", replace, lambda: at_event(None))
    duration = time.monotonic() - begun
    events = (folder / "events.txt").read_text().splitlines()
    for line in sys.stdin:
        order = json.loads(line)
        names = order.get("signals", [])
        signals = [getattr(signal, name) for name in names]
        if order["kind"] == "events":
            within = [number for number, event in enumerate(events, 1) if order["within"] in event]
            for number in within[order["first"] :: order["step"]]:
                kind = f"{names} at event {number} of {len(events)}, {events[number - 1]}"
                trial(kind, replace, lambda: at_event(number, *signals))
        elif order["kind"] == "moments":
            for fraction in order["fractions"]:
                def stop(child):
                    time.sleep(fraction * duration)
                    for one in signals:
                        os.kill(child, one)
                trial(f"{names} after {fraction:.3f} of {duration:.2f} s", replace, lambda: None, stop)
        elif order["kind"] == "file size":
            def limit():
                resource.setrlimit(resource.RLIMIT_FSIZE, (order["bytes"], order["bytes"]))
            trial(f"files of at most {order['bytes']} bytes", replace, limit)
        elif order["kind"] == "full disk":
            trial("full disk", [new, "-o", order["target"], *flags, *order["flags"]], lambda: None)
        elif order["kind"] == "killed, then again":
            child = run(replace, lambda: at_event(len(events) // 2, signal.SIGKILL))
            ended(child)
            trial("after a kill", replace, lambda: None)
        print(json.dumps({"kind": "end"}), flush=True)


main()
'''


def save(path: Path, seed: int, *, width: int = 24) -> None:
    """A small checkpoint whose weights are seeded."""
    config = TaskExpertConfig(
        input_dim=12, backbone_dim=width, expert_dim=8, num_experts=2, num_tasks=2, task_output_dims=(3, 1)
    )
    model = TaskExpertModel(config)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = rng.standard_normal(parameter.shape) / math.sqrt(parameter.shape[-1])
            parameter.copy_(torch.from_numpy(values))
    torch.save(model.state_dict(), path)


class Exporter:
    """The process that trials are forks of."""

    def __init__(self, folder: Path, *flags: str | Path) -> None:
        self.folder = folder
        with (folder / "driver.txt").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(folder), *map(str, flags)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                text=True,
            )
        self.old = str(self._read()["old"])
        undisturbed = self._read()
        assert undisturbed["code"] == 0, undisturbed
        self.new = str(undisturbed["state"])
        assert re.fullmatch("[0-9a-f]{64}", self.new)
        assert self.new != self.old
        assert undisturbed["siblings"] == []

    def trials(self, **order: object) -> list[dict[str, object]]:
        """Have it make trials; what was found after each."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        found = []
        while (record := self._read())["kind"] != "end":
            found.append(record)
        assert found
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _read(self) -> dict[str, object]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, (self.folder / "driver.txt").read_text()
        record: dict[str, object] = json.loads(line)
        return record


@pytest.fixture(scope="module")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    folder = tmp_path_factory.mktemp("crashes")
    save(folder / "a.pt", 1)
    save(folder / "b.pt", 2)
    running = Exporter(folder)
    yield running
    running.close()


@pytest.fixture(scope="module")
def int8_exporter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    folder = tmp_path_factory.mktemp("int8 crashes")
    save(folder / "a.pt", 1, width=160)
    save(folder / "b.pt", 2, width=160)
    np.savez(folder / "rows.npz", x=np.random.default_rng(0).standard_normal((64, 12)))
    running = Exporter(folder, "--precision", "int8", "--calibration-data", folder / "rows.npz", *ANY_LOSS)
    yield running
    running.close()


def assert_whole(exporter: Exporter, record: dict[str, object]) -> None:
    """The old bundle or the new one, whole; the new one wherever the command said that it was done."""
    assert record["state"] in (exporter.old, exporter.new), record
    if record["code"] == 0:
        assert record["state"] == exporter.new, record


def assert_tidy(record: dict[str, object]) -> None:
    assert record["siblings"] == [], record
    assert "Traceback" not in str(record["output"]), record


def test_killed_at_every_step_the_bundle_is_whole(exporter: Exporter) -> None:
    found = exporter.trials(kind="events", signals=["SIGKILL"], within="", first=0, step=1)

    assert len(found) > 25, found
    for record in found:
        assert record["code"] == -signal.SIGKILL
        assert_whole(exporter, record)
    assert {record["state"] for record in found} == {exporter.old, exporter.new}


@pytest.mark.parametrize(("name", "first"), [("SIGINT", 0), ("SIGTERM", 1), ("SIGHUP", 2)])
def test_interrupted_at_any_step_the_bundle_is_whole_and_nothing_is_left(
    name: str, first: int, exporter: Exporter
) -> None:
    found = exporter.trials(kind="events", signals=[name], within="", first=first, step=4)

    assert len(found) > 8
    for record in found:
        assert record["code"] == 130, record
        assert "error: interrupted" in str(record["output"])
        assert_whole(exporter, record)
        assert_tidy(record)


def test_interrupted_twice_at_a_step_nothing_is_left_either(exporter: Exporter) -> None:
    found = exporter.trials(kind="events", signals=["SIGINT", "SIGTERM"], within="", first=3, step=5)

    for record in found:
        assert record["code"] == 130, record
        assert_whole(exporter, record)
        assert_tidy(record)


def test_killed_while_int8_is_tried_out_the_old_bundle_stands(int8_exporter: Exporter) -> None:
    found = int8_exporter.trials(kind="events", signals=["SIGKILL"], within="scratch", first=0, step=2)

    assert len(found) > 12, found
    for record in found:
        assert record["code"] == -signal.SIGKILL
        assert record["state"] == int8_exporter.old


@pytest.mark.parametrize(("name", "first"), [("SIGINT", 0), ("SIGTERM", 3)])
def test_interrupted_while_int8_is_tried_out_nothing_is_left(
    name: str, first: int, int8_exporter: Exporter
) -> None:
    found = int8_exporter.trials(kind="events", signals=[name], within="scratch", first=first, step=4)

    assert len(found) > 5, found
    for record in found:
        assert record["code"] == 130, record
        assert record["state"] == int8_exporter.old
        assert_tidy(record)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_stopped_at_random_moments_the_bundle_is_whole(name: str, exporter: Exporter) -> None:
    rng = np.random.default_rng(len(name))
    fractions = sorted(rng.uniform(0.0, 1.1, 6).tolist())

    for record in exporter.trials(kind="moments", signals=[name], fractions=fractions):
        assert_whole(exporter, record)
        if name != "SIGKILL":
            assert record["siblings"] == [], record


@pytest.mark.parametrize("size_bytes", [1500, 3000, 9000])
def test_a_file_that_cannot_grow_leaves_the_old_bundle(size_bytes: int, exporter: Exporter) -> None:
    """RLIMIT_FSIZE fails a write half way through, as a quota or a full disk does."""
    (record,) = exporter.trials(kind="file size", bytes=size_bytes)

    assert record["code"] == 2, record
    assert record["state"] == exporter.old
    assert "cannot be written: File too large" in str(record["output"])
    assert_tidy(record)


@pytest.fixture
def tiny_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of as many KiB as the test says, unmounted afterwards."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounts a tmpfs: needs Linux and root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "te-export-test", tmp_path],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounts a tmpfs: needs a machine that allows it ({mounted.stderr.strip()})")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    ("tiny_disk", "problem"),
    [(16, "no space for the bundle"), (48, "No space left on device")],
    indirect=["tiny_disk"],
    ids=["foreseen", "met while writing"],
)
def test_a_full_disk_is_left_empty(problem: str, tiny_disk: Path, exporter: Exporter) -> None:
    (record,) = exporter.trials(kind="full disk", target=str(tiny_disk / "out"), flags=["--standalone"])

    assert record["code"] == 2, record
    assert problem in str(record["output"])
    assert list(tiny_disk.iterdir()) == []
    assert_tidy(record)


@pytest.mark.parametrize("tiny_disk", [900], indirect=True)
def test_a_disk_that_fills_while_int8_is_tried_out_is_left_empty(
    tiny_disk: Path, int8_exporter: Exporter
) -> None:
    (record,) = int8_exporter.trials(kind="full disk", target=str(tiny_disk / "out"), flags=[])

    assert record["code"] == 2, record
    assert "rows through every graph" in str(record["output"])  # of fp32, which fits
    assert "No space left on device" in str(record["output"])
    assert list(tiny_disk.iterdir()) == []
    assert_tidy(record)


def test_what_a_killed_export_left_is_named_and_in_nobodys_way(exporter: Exporter) -> None:
    (record,) = exporter.trials(kind="killed, then again")

    assert record["code"] == 0
    assert record["state"] == exporter.new
    (left,) = record["siblings"]  # type: ignore[misc]
    assert f"{left} was left by an export" in str(record["output"])


def test_a_whole_process_interrupted_in_the_capture_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path / "model.pt", 3)
    process = subprocess.Popen(
        [sys.executable, "-m", "te_export.cli", str(tmp_path / "model.pt"), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline().strip().startswith("read")
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)

    # CPython ends itself by SIGINT, which shells show as 130 too, where the interrupt passed through an exec().
    assert process.returncode in (130, -signal.SIGINT), err
    assert json.loads(out)["exit_code"] == 130
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]

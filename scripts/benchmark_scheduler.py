"""Measures the scheduler on R: mixed requests of one row each, over five tasks, asked for from the same process.

Throughput: client threads keep four times max_batch requests outstanding between them. The naive rival is a session per
task, torch.onnx.export as it comes, called directly from whatever number of threads suits it best. Its five sessions hold
64 MB of weights and sweep each other's out of the caches, which is most of what it loses; so one such session asked for
its task alone is given beside it. The offline rival is the joint graph, called by two threads with full batches of the best
size. All take turns in one run; a case beside which other processes took the CPUs is run again, whatever it found.

Open loop: one thread sends requests at random moments (a Poisson process) whether or not the last ones are answered.
Capacity is the highest rate of which 99 % is answered by 20 ms after the last arrival's time. At 80 % of it a deadline of
20 ms, and the latency, count from the planned arrival; at 300 %, where the generator itself falls behind, from submission.

A lonely request is sent by submit and waited for by result(), in turn with a direct predict; from a thread, whose caller
runs his batch himself where its executor has not begun it, and from the main thread, which never does.

The generator is Python in the same process and shares its lock and CPUs with the scheduler, as an application's
callers do. What it takes is told: the CPUs of the clients' threads, submit included, and the cost of the generator alone,
against a scheduler that answers at once and does nothing. Python's garbage collector is told to leave alone what was
made before (gc.freeze), as docs/scheduler.md advises. Prints Markdown; `--json FILE` keeps every figure.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from scheduler_deadlines import OpenLoop, measure_open_loop
from scheduler_load import Row as InputRow
from scheduler_load import Stream, WindowClient, drive, poisson_arrivals, send
from scheduler_lonely import measure_lonely
from scheduler_table import (
    Lonely,
    Million,
    Row,
    lonely_rows,
    markdown,
    million_rows,
    open_rows,
    throughput_rows,
)
from scheduler_throughput import PRECISIONS, WIDTH, WINDOWS, Measured, measure_throughput

import te_runtime

_PARTS = ("throughput", "deadlines", "lonely", "million")
_LONELY_CASES = (("a thread", 0.0), ("a thread", 5.0), ("the main thread", 0.0))
_LONELY_CALLS = 500
_TOLERANCES = {"fp32": 1e-3, "int8": 0.5}  # of the standard deviation; int8 rounds a row anew in every batch


def make_subjects(folder: Path) -> None:
    """Export what is measured, unless the folder has it."""
    if (folder / "bundle" / "manifest.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("scheduler_subjects.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the export of what is measured failed:\n{done.stderr}")


def check_answers(folder: Path) -> None:
    """Answers of mixed batches are those of predict, before anything is timed."""
    for precision in PRECISIONS:
        with (
            te_runtime.load(folder / "bundle", precision=precision, threads=1) as model,
            te_runtime.Scheduler(model) as scheduler,
        ):
            requests = Stream(model.tasks, width=WIDTH, seed=1).requests[:500]
            futures = [scheduler.submit(row, task=task) for row, task in requests]
            found = [np.asarray(future.result().output, np.float64) for future in futures]
            wanted = [
                np.asarray(model.predict(row, [task])[task].output, np.float64) for row, task in requests
            ]
            scale = float(np.std(np.concatenate([one.ravel() for one in wanted])))
            worst = max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True)) / scale
            if worst > _TOLERANCES[precision]:
                raise SystemExit(
                    f"{precision}: an answer is {worst:.3g} standard deviations from that of predict, expected "
                    f"at most {_TOLERANCES[precision]}"
                )


def measure_deadlines(folder: Path, *, repetitions: int, seconds: float) -> list[OpenLoop]:
    """Capacity, 80 % and 300 % of it, for each precision in turn."""
    found = []
    for repetition in range(repetitions):
        for precision in PRECISIONS:
            progress(f"deadlines, {precision}, repetition {repetition + 1} of {repetitions}")
            with (
                te_runtime.load(folder / "bundle", precision=precision, threads=1) as model,
                te_runtime.Scheduler(model) as scheduler,
            ):
                stream = Stream(model.tasks, width=WIDTH, seed=repetition)
                freeze()
                client = WindowClient(scheduler.submit, stream, window=WINDOWS * 64)
                highest = 1.25 * drive([client], seconds=seconds).per_s
                found.append(
                    measure_open_loop(
                        scheduler.submit,
                        stream,
                        precision=precision,
                        repetition=repetition,
                        highest_per_s=highest,
                        seconds=seconds,
                    )
                )
    return found


def measure_lonely_requests(folder: Path, *, repetitions: int) -> list[Lonely]:
    """One request at a time, each precision in turn."""
    found = []
    for repetition in range(repetitions):
        progress(f"lonely, repetition {repetition + 1} of {repetitions}")
        for precision in PRECISIONS:
            with (
                te_runtime.load(folder / "bundle", precision=precision, threads=1) as model,
                te_runtime.Scheduler(model) as scheduler,
            ):
                stream = Stream(model.tasks, width=WIDTH, seed=repetition)
                for caller, pause_ms in _LONELY_CASES:
                    measure = functools.partial(
                        measure_lonely, model, scheduler, stream, calls=_LONELY_CALLS, pause_s=pause_ms / 1e3
                    )
                    if caller == "a thread":
                        with ThreadPoolExecutor(1) as pool:
                            medians = pool.submit(measure).result()
                    else:
                        medians = measure()
                    found.append(Lonely(precision, caller, pause_ms, *medians))
    return found


def measure_million(folder: Path, requests: int) -> Million:
    """In a process of its own, in float32."""
    progress(f"{requests:,} requests")
    script = Path(__file__).with_name("scheduler_million.py")
    command = [sys.executable, str(script), str(folder / "bundle"), str(requests)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the run of {requests} requests failed:\n{done.stderr}")
    return Million(**json.loads(done.stdout))


def measure_generator() -> Iterator[Row]:
    """What the generator costs against a scheduler that answers at once."""
    answered: Future[Any] = Future()
    answered.set_result(None)

    def submit(x: InputRow, *, task: str, deadline_ms: float | None = None) -> Future[Any]:  # noqa: ARG001
        return answered

    stream = Stream(("task_0",), width=WIDTH, seed=0)
    rate = drive([WindowClient(submit, stream, window=256)], seconds=0.5)
    yield "the closed loop's own cost, for each request", "—", f"{1e6 / rate.per_s:.2f} µs"
    arrivals = poisson_arrivals(20_000.0, 1.0, 0)
    run = send(submit, stream, arrivals, deadline_ms=20.0)
    yield (
        "the open loop's own cost at 20,000 requests/s, for each request",
        "—",
        f"{run.generator_cpus * 1e6 / run.sent_per_s:.2f} µs",
    )


def freeze() -> None:
    """Have the garbage collector leave alone what is there now."""
    gc.collect()
    gc.freeze()


def progress(what: str) -> None:
    print(f"scheduler: {what}", file=sys.stderr, flush=True)


def describe_machine() -> str:
    loads = os.getloadavg()
    return (
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, onnxruntime "
        f"{onnxruntime.__version__}, load {loads[0]:.1f}, switch interval {sys.getswitchinterval() * 1e3:g} ms"
    )


def main() -> None:
    arguments = parse_arguments()
    if arguments.switch_interval_ms is not None:
        sys.setswitchinterval(arguments.switch_interval_ms / 1e3)
    kept: dict[str, Any] = {"machine": describe_machine()}
    rows = list(measure_generator())
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.subjects or Path(temporary) / "subjects"
        progress("exporting what is measured")
        make_subjects(folder)
        check_answers(folder)
        freeze()
        parts: dict[str, Callable[[], tuple[Sequence[Any], Iterator[Row]]]] = {
            "throughput": lambda: _throughput(folder, arguments),
            "deadlines": lambda: _deadlines(folder, arguments),
            "lonely": lambda: _lonely(folder, arguments),
            "million": lambda: _million(folder, arguments),
        }
        for name in arguments.part or _PARTS:
            found, own = parts[name]()
            rows += own
            kept[name] = [asdict(one) for one in found]
    minutes = (time.monotonic() - begun) / 60
    print(f"{kept['machine']}; {describe_machine().split(', ')[4]} at the end, {minutes:.0f} minutes\n")
    print(markdown(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(kept, indent=1))


def _throughput(folder: Path, arguments: argparse.Namespace) -> tuple[list[Measured], Iterator[Row]]:
    found = measure_throughput(
        folder, repetitions=arguments.repetitions, seconds=arguments.seconds, progress=progress
    )
    return found, throughput_rows(found)


def _deadlines(folder: Path, arguments: argparse.Namespace) -> tuple[list[OpenLoop], Iterator[Row]]:
    found = measure_deadlines(folder, repetitions=arguments.repetitions, seconds=arguments.seconds)
    return found, open_rows(found)


def _lonely(folder: Path, arguments: argparse.Namespace) -> tuple[list[Lonely], Iterator[Row]]:
    found = measure_lonely_requests(folder, repetitions=arguments.repetitions)
    return found, lonely_rows(found)


def _million(folder: Path, arguments: argparse.Namespace) -> tuple[list[Million], Iterator[Row]]:
    found = measure_million(folder, arguments.million)
    return [found], million_rows(found)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of each case, and of each run of a search"
    )
    parser.add_argument(
        "--million", type=int, default=1_000_000, help="how many requests to look for growth in"
    )
    parser.add_argument("--part", action="append", choices=_PARTS, help="measure this alone (repeatable)")
    parser.add_argument("--switch-interval-ms", type=float, help="sys.setswitchinterval; Python's own is 5")
    parser.add_argument("--subjects", type=Path, help="keep the exported models here, and use them again")
    parser.add_argument("--json", type=Path, help="where to keep every figure")
    return parser.parse_args()


if __name__ == "__main__":
    main()

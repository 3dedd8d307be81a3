"""One bundle, loaded to be measured: what runs, what its cold start took, and queries to time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from te_runtime.bench_clock import Clock
from te_runtime.bench_memory import GpuMemory, read_gpu, read_pss_bytes
from te_runtime.bench_options import LoadOptions
from te_runtime.bench_rows import BenchRows, cut_queries
from te_runtime.bench_scenarios import Call
from te_runtime.cuda_driver import DeviceMemory
from te_runtime.plan import Plan
from te_runtime.predictor import load
from te_runtime.providers import CudaOptions, ProviderChoice
from te_runtime.threads import parse_threads

__all__ = ["Subject", "open_subject"]


@dataclass(frozen=True)
class Subject:
    """A loaded model and how it came to be loaded.

    Attributes:
        path: the bundle.
        precision: the variant that runs.
        choice: where it runs.
        ran_on: where the first prediction was computed, as it says itself.
        threads: CPU threads of one call.
        plan: which graphs are open, and why.
        load_ns: from the folder to the loaded model, checksums included; files may lie in the system's cache.
        first_ns: the first prediction, of one row.
        pss_before_bytes: PSS of the process before loading; None where the system does not tell.
        pss_ready_bytes: the same after the first prediction.
        gpu_memory: the same of the GPU; None on the CPU.
        queries: makes the callable that answers queries of some number of rows each.
        close: lets go of the model.
    """

    path: Path
    precision: str
    choice: ProviderChoice
    ran_on: str
    threads: int
    plan: Plan
    load_ns: int
    first_ns: int
    pss_before_bytes: int | None
    pss_ready_bytes: int | None
    gpu_memory: GpuMemory | None
    queries: Callable[[int], Call]
    close: Callable[[], None]


def open_subject(
    path: Path,
    rows: BenchRows,
    options: LoadOptions,
    clock: Clock,
    *,
    pss_bytes: Callable[[], int | None] = read_pss_bytes,
    gpu: Callable[[int], DeviceMemory] = read_gpu,
) -> Subject:
    """Load a bundle and predict once.

    Args:
        path: the bundle.
        rows: what to predict, and for what; may be another bundle's.
        options: how to load it.
        clock: tells the time.
        pss_bytes: tells this process's memory; a test passes its own.
        gpu: tells how much of a GPU's memory is in use, by its number; a test passes its own.

    Raises:
        Whatever te_runtime.load and predict raise.
    """

    def queries(rows_per_query: int) -> Call:
        feeds = cut_queries(rows, rows_per_query)
        count, predict = len(feeds), model.predict
        return lambda number: predict(feeds[number % count], rows.tasks)

    threads, device = parse_threads(options.threads), (options.cuda or CudaOptions()).device_id
    one_row = cut_queries(rows, 1)[0]
    before = pss_bytes()
    gpu_before = None if options.provider == "cpu" else gpu(device)
    begun = clock.wall_ns()
    model = load(
        path,
        provider=options.provider,
        precision=options.precision,
        threads=threads,
        mode=options.mode,
        cuda=options.cuda,
    )
    loaded = clock.wall_ns()
    first = model.predict(one_row, rows.tasks)
    done = clock.wall_ns()
    is_on_gpu = model.provider == "cuda"  # auto may have taken the CPU
    return Subject(
        path=path,
        precision=model.precision,
        choice=model.provider_choice,
        ran_on=first[rows.tasks[0]].provider,
        threads=threads,
        plan=model.plan,
        load_ns=loaded - begun,
        first_ns=done - loaded,
        pss_before_bytes=before,
        pss_ready_bytes=pss_bytes(),
        gpu_memory=GpuMemory(gpu_before, gpu(device)) if gpu_before is not None and is_on_gpu else None,
        queries=queries,
        close=model.close,
    )

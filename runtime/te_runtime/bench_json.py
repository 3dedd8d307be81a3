"""What `te-runtime bench --json` prints. Raw samples are in it: all of them up to 10,000 per measurement, and every
n-th where there are more, with n beside them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from te_runtime.bench_memory import GpuMemory
from te_runtime.bench_options import Other
from te_runtime.bench_ratio import RATIO_PARTS, PairRatio
from te_runtime.bench_run import BenchReport, Measured, Result
from te_runtime.bench_samples import NOISY_ABOVE, PARTS, Spread, spread_of_parts, summarize
from te_runtime.bench_server import Found, Trial
from te_runtime.bench_subject import Subject
from te_runtime.provider_text import provider_json

if TYPE_CHECKING:
    from te_runtime.describe import Json

__all__ = ["MAX_SAMPLES", "bench_json", "subject_json"]

MAX_SAMPLES = 10_000


def bench_json(report: BenchReport) -> dict[str, Json]:
    """The object, without status and exit code; `interrupted` says that Ctrl-C ended it early."""
    environment, options = report.environment, report.options
    told: dict[str, Json] = {
        "interrupted": report.is_interrupted,
        "environment": {**dataclasses.asdict(environment), "onnxruntime_import_ms": report.import_ns / 1e6},
        "settings": {
            "scenarios": list(options.scenarios),
            "batches": list(options.batches),
            "duration_s": options.duration_ns / 1e9,
            "tasks": list(report.rows.tasks),
            "p99_bound_ms": None if options.p99_ns is None else options.p99_ns / 1e6,
            "seed": options.seed,
            "compare": None if options.compare is None else _other_json(options.compare),
            "rows": {"group": report.rows.group, "count": report.rows.count},
        },
        "rules": {
            "percentiles": "nearest rank; p99.9 from 1,000 samples on",
            "parts": PARTS,
            "ratio_parts": RATIO_PARTS,
            "noisy_above": NOISY_ABOVE,
            "noisy": "parts' medians, or a ratio's 95 % interval, further apart than that",
            "samples_at_most": MAX_SAMPLES,
            "ratio": "latency of the first bundle over that of the second, pair by pair",
        },
        "bundles": [subject_json(subject) for subject in report.subjects],
        "results": [_result_json(result, report.subjects) for result in report.results],
    }
    return {"status": "interrupted", **told} if report.is_interrupted else told


def _other_json(other: Other) -> Json:
    """What was asked for; null is as for the first bundle. What ran is among `bundles`."""
    return {
        "bundle": None if other.path is None else str(other.path),
        "precision": other.precision,
        "mode": other.mode,
    }


def subject_json(subject: Subject) -> dict[str, Json]:
    """A bundle that was loaded: what runs, its cold start and its memory."""
    before, ready = subject.pss_before_bytes, subject.pss_ready_bytes
    return {
        "bundle": str(subject.path),
        "precision": subject.precision,
        **provider_json(subject.choice),
        "ran_on": subject.ran_on,
        "threads": subject.threads,
        "plan": {
            "mode": subject.plan.mode,
            "reason": subject.plan.reason,
            "graphs": list(subject.plan.graphs),
        },
        "load_ms": subject.load_ns / 1e6,
        "first_prediction_ms": subject.first_ns / 1e6,
        "pss_before_bytes": before,
        "pss_ready_bytes": ready,
        "model_pss_bytes": None if before is None or ready is None else ready - before,
        "gpu_memory": None if subject.gpu_memory is None else _gpu_json(subject.gpu_memory),
    }


def _gpu_json(memory: GpuMemory) -> Json:
    return {
        "before_bytes": memory.before.used_bytes,
        "ready_bytes": memory.ready.used_bytes,
        "model_bytes": memory.model_bytes,
        "not_measured": memory.problem,
    }


def _result_json(result: Result, subjects: tuple[Subject, ...]) -> Json:
    return {
        "scenario": result.scenario,
        "rows_per_call": result.rows_per_call,
        "interrupted": result.is_interrupted,
        "bundles": [
            {
                "bundle": str(subject.path),
                "precision": subject.precision,
                "mode": subject.plan.mode,
                **_measured_json(measured),
            }
            for subject, measured in zip(
                subjects, result.of, strict=False
            )  # none where a search was interrupted
        ],
        "ratio": None if result.ratio is None else _ratio_json(result.ratio),
        "server": None if result.server is None else _server_json(result.server),
    }


def _measured_json(measured: Measured) -> Mapping[str, Json]:
    timed, samples = measured.timed, measured.timed.latencies_ns
    latency = summarize(samples)
    every = math.ceil(len(samples) / MAX_SAMPLES)
    return {
        "calls": latency.count,
        "rows_per_s": timed.rows_per_s,
        "latency_ms": {
            "p50": latency.p50_ns / 1e6,
            "p90": latency.p90_ns / 1e6,
            "p99": latency.p99_ns / 1e6,
            "p99.9": None if latency.p999_ns is None else latency.p999_ns / 1e6,
            "mean": latency.mean_ns / 1e6,
            "min": latency.min_ns / 1e6,
            "max": latency.max_ns / 1e6,
        },
        "parts": _spread_json(spread_of_parts(samples)),
        "wall_s": timed.wall_ns / 1e9,
        "cpu_s": timed.cpu_ns / 1e9,
        "cpu_s_per_s": timed.cpu_ns / max(1, timed.wall_ns),
        "cpu_us_per_row": timed.cpu_ns / 1e3 / timed.rows,
        "warm_up": {"calls": measured.warm_up.calls, "settled": measured.warm_up.settled},
        "samples_every": every,
        "samples_ns": list(samples[::every]),
    }


def _spread_json(spread: Spread) -> Json:
    return {
        "medians_ms": [median / 1e6 for median in spread.medians_ns],
        "apart": spread.apart,
        "state": spread.state,
    }


def _ratio_json(ratio: PairRatio) -> Json:
    return {
        "pairs": ratio.pairs,
        "median": ratio.median,
        "p10": ratio.low,
        "p90": ratio.high,
        "median_95_percent": [ratio.sure_low, ratio.sure_high],
        "parts": list(ratio.parts),
        "parts_apart": ratio.parts_apart,
        "told_from_1": ratio.is_told_from_one,
        "state": ratio.state,
    }


def _server_json(found: Found) -> Json:
    return {
        "rate_per_s": None if found.best is None else found.best.rate_per_s,
        "trials": [_trial_json(trial) for trial in found.trials],
    }


def _trial_json(trial: Trial) -> Json:
    return {
        "rate_per_s": trial.rate_per_s,
        "queries": len(trial.timed.latencies_ns),
        "p99_ms": trial.p99_ns / 1e6,
        "holds": trial.holds,
        "gave_up": trial.gave_up,
    }

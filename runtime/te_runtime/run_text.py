"""What `te-runtime run` prints: text for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from te_runtime.inputs import shown_shape
from te_runtime.plan import Plan
from te_runtime.prediction import Prediction
from te_runtime.provider_text import choice_lines, provider_json, shown_provider
from te_runtime.providers import ProviderChoice
from te_runtime.utilization import Utilization

if TYPE_CHECKING:
    from te_runtime.describe import Json

__all__ = ["RunReport", "run_json", "run_text"]

MAX_ROWS_SHOWN = 3
MAX_VALUES_SHOWN = 8


@dataclass(frozen=True)
class RunReport:
    """What there is to say of one run.

    Attributes:
        predictions: the answers, by task.
        output: the file that they were written to.
        precision: the variant that ran.
        choice: where it ran.
        plan: which graphs were open.
        utilization: how the experts were used, by task; may hold tasks that were not asked for.
    """

    predictions: Mapping[str, Prediction]
    output: Path
    precision: str
    choice: ProviderChoice
    plan: Plan
    utilization: Mapping[str, Utilization]


def run_text(report: RunReport) -> Iterator[str]:
    """The lines of `te-runtime run`."""
    for task, prediction in report.predictions.items():
        weights = prediction.routing_weights
        routing = f", routing weights {shown_shape(weights.shape)}" if weights is not None else ""
        yield f"{task}: prediction {shown_shape(prediction.output.shape)}{routing}"
        yield from _row_lines(prediction)
        if task in report.utilization:
            yield _utilization_line(report.utilization[task])
    first = next(iter(report.predictions))
    yield f"Ran {report.precision} on {shown_provider(report.choice)}, mode {report.plan.mode}"
    yield from choice_lines(report.choice)
    yield f"Wrote {report.output}"
    yield f'Read it with numpy: numpy.load("{report.output.name}")["{first}.prediction"]'


def run_json(report: RunReport) -> dict[str, Json]:
    """What `te-runtime run --json` prints."""
    return {
        "output": str(report.output),
        "precision": report.precision,
        **provider_json(report.choice),
        "plan": {
            "mode": report.plan.mode,
            "reason": report.plan.reason,
            "graphs": list(report.plan.graphs),
        },
        "tasks": {
            task: _task_json(prediction, report.utilization.get(task))
            for task, prediction in report.predictions.items()
        },
    }


def _row_lines(prediction: Prediction) -> Iterator[str]:
    for number, row in enumerate(entry.ravel().tolist() for entry in prediction.output[:MAX_ROWS_SHOWN]):
        shown = "  ".join(f"{value:.4g}" for value in row[:MAX_VALUES_SHOWN])
        more = f"  … {len(row) - MAX_VALUES_SHOWN} more" if len(row) > MAX_VALUES_SHOWN else ""
        yield f"  row {number}: {shown}{more}"
    if len(prediction.output) > MAX_ROWS_SHOWN:
        yield f"  … {len(prediction.output) - MAX_ROWS_SHOWN} more rows"


def _utilization_line(used: Utilization) -> str:
    parts = ["  mean routing weights: no rows"]
    if used.mean is not None:
        shown = " ".join(f"{weight:.2f}" for weight in used.mean[:MAX_VALUES_SHOWN])
        hidden = len(used.mean) - MAX_VALUES_SHOWN
        parts = [f"  mean routing weights {shown}" + (f" … {hidden} more" if hidden > 0 else "")]
        if used.distance is None:
            parts.append("this bundle has no baseline")
        else:
            parts.append(f"{used.distance:.2g} from the baseline (0 same, 1 unlike)")
    if used.rows_not_finite:
        rows = used.rows + used.rows_not_finite
        parts.append(f"{used.rows_not_finite} of {rows} rows left out: not finite")
    return "; ".join(parts)


def _task_json(prediction: Prediction, used: Utilization | None) -> Json:
    weights = prediction.routing_weights
    return {
        "prediction": list(prediction.output.shape),
        "routing_weights": None if weights is None else list(weights.shape),
        "utilization": None if used is None else _utilization_json(used),
    }


def _utilization_json(used: Utilization) -> Json:
    return {
        "rows": used.rows,
        "rows_not_finite": used.rows_not_finite,
        "mean": None if used.mean is None else list(used.mean),
        "baseline": None if used.baseline is None else list(used.baseline),
        "distance": used.distance,
    }

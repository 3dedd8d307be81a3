"""Times the trained models as ONNX graphs that give all tasks, on one thread.

Graphs take turns as interleaved_calls.py says. Every family is exported by torch.onnx.export with a dynamic
batch axis; TaskExpert a second time by te-export, whose joint graph gives the routing weights as well. A
graph is timed only if it answers as the model does.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from interleaved_calls import TIMED_CALLS, open_session, time_calls
from numpy.typing import NDArray
from reference_graphs import quiet_torch
from sharing_models import Family, SharingModel, TaskExpert
from sharing_results import Latency

import te_export
from te_export.capture.joint_graph import prediction_name

BATCH_SIZES = (1, 64)
TE_EXPORT_GRAPH = "TaskExpert, te-export"
ATOL = 1e-4
"""Float32's rounding moves answers of about 1 by less than 1e-5; a wrong graph moves them by far more."""


def measure_latencies(
    models: Mapping[Family, SharingModel], x: torch.Tensor, *, seconds: float
) -> list[Latency]:
    """Exports and times the models.

    Args:
        models: in eval mode.
        x: (at least 64, D) rows to predict.
        seconds: for each batch size.
    """
    with tempfile.TemporaryDirectory() as folder:
        sessions = {name: open_session(path) for name, path in export_models(models, x, Path(folder)).items()}
        for name, session in sessions.items():
            check_answers(name, session, models, x[:64])
        rng = random.Random(0)
        found = []
        for batch in BATCH_SIZES:
            rows = x[:batch].numpy()
            feeds = {name: {session.get_inputs()[0].name: rows} for name, session in sessions.items()}
            samples = time_calls(sessions, feeds, seconds=seconds, rng=rng)
            found += [summed_up(name, batch, samples_us) for name, samples_us in samples.items()]
    return found


def export_models(models: Mapping[Family, SharingModel], x: torch.Tensor, folder: Path) -> dict[str, Path]:
    """The graphs, by name."""
    paths: dict[str, Path] = {}
    for family, model in models.items():
        paths[family.value] = folder / f"{family.name}.onnx"
        with quiet_torch():
            torch.onnx.export(
                model,
                (x[:2],),
                paths[family.value],
                dynamo=True,
                verbose=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        if isinstance(model, TaskExpert):
            torch.save(model.model.state_dict(), folder / "model.pt")
            paths[TE_EXPORT_GRAPH] = te_export.export(folder / "model.pt").bundle / "fp32/joint.onnx"
    return paths


@torch.no_grad()
def check_answers(
    name: str,
    session: onnxruntime.InferenceSession,
    models: Mapping[Family, SharingModel],
    x: torch.Tensor,
) -> None:
    """Compares a graph's predictions with its model's.

    Raises:
        ArithmeticError: they differ.
    """
    model = models[Family.TASK_EXPERT if name == TE_EXPORT_GRAPH else Family(name)]
    expected = [prediction.numpy() for prediction in model(x)]
    names = [prediction_name(f"task_{task}") for task in range(len(expected))]
    asked_for = names if name == TE_EXPORT_GRAPH else None
    found = session.run(asked_for, {session.get_inputs()[0].name: x.numpy()})
    worst = np.max([largest_error(*pair) for pair in zip(expected, found, strict=True)])  # NaN stays NaN
    if not worst <= ATOL:
        raise ArithmeticError(f"the graph of {name} is {worst:.2g} off its model, allowed {ATOL}")


def largest_error(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    return float(np.abs(expected - actual).max())


def summed_up(graph: str, batch: int, samples_us: list[float]) -> Latency:
    low, median, high = np.percentile(samples_us, (10, 50, 90))
    rounds = np.median(np.reshape(samples_us, (-1, TIMED_CALLS)), axis=1)
    return Latency(
        graph=graph,
        batch=batch,
        calls=len(samples_us),
        median_us=float(median),
        p10_us=float(low),
        p90_us=float(high),
        round_medians_us=np.round(rounds, 1).tolist(),
    )

"""How each task uses the experts on given rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from te_export.capture.joint_graph import routing_weights_name
from te_export.models.input_rows import InputRows
from te_runtime.session_types import Session

__all__ = ["ExpertUse", "measure_use"]

_BATCH = 64


@dataclass(frozen=True)
class ExpertUse:
    """The routing weights of one task over all rows.

    Attributes:
        mean, largest: one number per expert.
    """

    mean: tuple[float, ...]
    largest: tuple[float, ...]

    def candidates(self) -> tuple[int, ...]:
        """Experts whose weight stays under 1/K, the share of each if all were used alike; least used first."""
        share = 1 / len(self.largest)
        order = sorted(range(len(self.largest)), key=lambda expert: self.largest[expert])
        return tuple(expert for expert in order if self.largest[expert] < share)


def measure_use(joint: Session, x: InputRows, tasks: tuple[str, ...]) -> dict[str, ExpertUse]:
    """Run the joint graph over rows.

    Args:
        tasks: those that have a gate.

    Returns:
        By task name.

    Raises:
        BundleError: onnxruntime gave up.
    """
    names = [spec.name for spec in joint.spec.outputs]
    places = {task: names.index(routing_weights_name(task)) for task in tasks}
    parts = [
        [outputs[place].astype(np.float64) for place in places.values()] for outputs in _batches(joint, x)
    ]
    weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    return {
        task: ExpertUse(mean=tuple(found.mean(axis=0).tolist()), largest=tuple(found.max(axis=0).tolist()))
        for task, found in zip(places, weights, strict=True)
    }


def _batches(session: Session, x: InputRows) -> Iterator[Sequence[NDArray[np.generic]]]:
    names = [spec.name for spec in session.spec.inputs]
    for start in range(0, len(x), _BATCH):
        yield session.run(x[start : start + _BATCH].feeds(names))

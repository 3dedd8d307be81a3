"""How far some outputs are from the oracle's, in figures.

Torch and every graph are measured by the same function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from te_export.verify.probe_rows import ORDINARY

__all__ = ["ErrorFigures", "absolute_errors", "measure_errors"]


@dataclass(frozen=True)
class ErrorFigures:
    """Errors of one output over all rows and batches.

    Attributes:
        max_abs: by group of rows, the largest absolute error; infinite where an output was NaN.
        max_rel: the largest error over the larger of the element's own magnitude and its group's RMS.
        rms: over ordinary rows, since large ones would drown them.
        argmax_agreement: fraction of rows whose largest element is the oracle's.
    """

    max_abs: Mapping[str, float]
    max_rel: float
    rms: float
    argmax_agreement: float

    def worst_with(self, other: ErrorFigures) -> ErrorFigures:
        """For each figure, the worse of the two."""
        return ErrorFigures(
            max_abs={group: max(error, other.max_abs[group]) for group, error in self.max_abs.items()},
            max_rel=max(self.max_rel, other.max_rel),
            rms=max(self.rms, other.rms),
            argmax_agreement=min(self.argmax_agreement, other.argmax_agreement),
        )


def absolute_errors(found: NDArray[np.generic], oracle: NDArray[np.float64]) -> NDArray[np.float64]:
    """|found - oracle|, infinite where that is NaN."""
    return np.nan_to_num(np.abs(found.astype(np.float64) - oracle), nan=np.inf, posinf=np.inf)


def measure_errors(
    found: NDArray[np.generic],
    oracle: NDArray[np.float64],
    *,
    indices: NDArray[np.int64],
    groups: Sequence[tuple[str, int, int]],
) -> ErrorFigures:
    """Measure outputs against the oracle's.

    Args:
        found: (M, …), over the concatenated batches.
        oracle: (N, …), over the probe rows.
        indices: (M,), the probe row of each row of `found`.
        groups: (name, first row, row after the last) of each group of probe rows.
    """
    exact = oracle[indices]
    errors = absolute_errors(found, exact)
    max_abs, max_rel, rms = {}, 0.0, 0.0
    for group, start, stop in groups:
        inside = (indices >= start) & (indices < stop)
        max_abs[group] = float(errors[inside].max())
        scale = np.maximum(np.abs(exact[inside]), max(_rms(oracle[start:stop]), np.finfo(np.float64).tiny))
        max_rel = max(max_rel, float((errors[inside] / scale).max()))
        if group == ORDINARY:
            rms = _rms(errors[inside])
    return ErrorFigures(max_abs, max_rel, rms, _agreement(found, exact))


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _agreement(found: NDArray[np.generic], exact: NDArray[np.float64]) -> float:
    winners = [values.reshape(len(values), -1).argmax(axis=1) for values in (found, exact)]
    return float(np.mean(winners[0] == winners[1]))

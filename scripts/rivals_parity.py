"""Whether a subject's answers are the model's: compared with torch in float64 on the rows that are timed.

An error is the root mean square of the differences over the standard deviation of float64's own answers from row to row;
of several tasks the worst counts. Bias terms alone can make up most of an answer, so an error over the size of the
answers would let a graph pass that has lost half the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Precision = Literal["float32", "bfloat16", "int8"]
ALLOWED: Mapping[Precision, float] = {"float32": 1e-4, "bfloat16": 0.3, "int8": 0.3}
"""Float32 rounds by about 1e-6 of the spread, a bfloat16 layer by about 1e-2, and answers that have nothing to do with
the rows err by 1 and more."""


class WrongAnswersError(ArithmeticError):
    """A subject gives other numbers than the model."""


def check_answers(
    found: Sequence[NDArray[np.generic]],
    expected: Sequence[NDArray[np.float64]],
    deviations: Sequence[float],
    precision: Precision,
) -> float:
    """The error of a subject's answers.

    Args:
        found: for each task (B, outputs).
        expected: float64 torch's, likewise.
        deviations: for each task, of float64 torch's answers over many rows.
        precision: what the subject computes in.

    Raises:
        WrongAnswersError: too large an error, or arrays of other shapes or dtypes.
    """
    shapes = [(array.shape, str(array.dtype)) for array in found]
    wanted = [(array.shape, "float32") for array in expected]
    if shapes != wanted:
        raise WrongAnswersError(f"its answers are {_shown(shapes)}, expected {_shown(wanted)}")
    errors = [
        float(np.sqrt(np.mean(np.square(own.astype(np.float64) - right)))) / deviation
        for own, right, deviation in zip(found, expected, deviations, strict=True)
    ]
    error = float(np.max(errors))  # NaN stays NaN
    if not error <= ALLOWED[precision]:
        raise WrongAnswersError(
            f"its answers are {error:.2g} of their spread off float64's, allowed for {precision}: {ALLOWED[precision]:g}"
        )
    return error


def _shown(shapes: Sequence[tuple[tuple[int, ...], str]]) -> str:
    more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
    return ", ".join(f"{dtype} {list(shape)}" for shape, dtype in shapes[:3]) + more

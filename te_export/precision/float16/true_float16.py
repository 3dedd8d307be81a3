"""What float16 does where nothing is quietly computed in float32.

On a CPU onnxruntime runs most float16 operators in float32 and keeps it between them, so a value beyond 65504
that is infinite on a GPU stays finite here. onnx's reference evaluator rounds every value to float16.

A row that chooses other experts, because two scores are equal in float16 or nearly, says nothing of that: what such rows
cost is judged with the accuracy of the variant. A few of them are left out here.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from te_export.errors import AccuracyError
from te_export.models.input_rows import InputRows
from te_export.precision.accuracy import TaskOracle, measure_accuracy
from te_export.precision.evaluation import Evaluation, first_rows, predictions_of
from te_export.rewrite.graph_cost import measure_cost

__all__ = ["check_true_float16"]

_MOST_ROWS = 64
_FEWEST_ROWS = 4
_MULTIPLY_ADDS = 1e9
_MOST_UNEXPLAINED_POINTS = 1.0
_MOST_CHOOSING_OTHERWISE = 1 / 8
"""Of the rows: where more choose otherwise, it is no accident of single rows."""


def check_true_float16(joint: ir.Model, evaluation: Evaluation) -> None:
    """Run the converted joint graph over the first rows of an evaluation, every value rounded to float16.

    Rows are fewer where the graph is large: the evaluator takes about a second for 10^9 multiply-adds.

    Raises:
        AccuracyError: an output is not finite, or leaves more than a hundredth of the oracle's variance
            unexplained.
    """
    per_row = max(1, measure_cost(joint.graph).multiply_adds)
    rows = int(min(_MOST_ROWS, len(evaluation.x), max(_FEWEST_ROWS, _MULTIPLY_ADDS / per_row)))
    few = first_rows(evaluation, rows)
    outputs = _run(joint, few.x)
    for task, oracle in few.tasks.items():
        prediction, weights = predictions_of(task, outputs)
        figures = measure_accuracy(*_choosing_alike(oracle, prediction, weights))
        points = 100.0 * figures.relative_error
        if not points <= _MOST_UNEXPLAINED_POINTS:
            raise AccuracyError(
                f"fp16 is left out: in float16 throughout, {task} leaves {points:.3g} points of its variance "
                f"unexplained over {rows} rows of {evaluation.source}, allowed {_MOST_UNEXPLAINED_POINTS:g}. A "
                "value is beyond float16's 65504, or too small for it; scale the model's inputs"
            )


def _choosing_alike(
    oracle: TaskOracle, prediction: NDArray[np.generic], weights: NDArray[np.generic] | None
) -> tuple[TaskOracle, NDArray[np.generic], NDArray[np.generic] | None]:
    """The rows that give weight to the same experts as the oracle's; all rows where few do, or there is no gate."""
    exact = oracle.routing_weights
    if exact is None or weights is None:
        return oracle, prediction, weights
    found = weights.astype(np.float64)
    alike = ((found > 0) == (exact > 0)).all(axis=1) | ~np.isfinite(found).all(axis=1)
    if np.mean(~alike) > _MOST_CHOOSING_OTHERWISE:
        return oracle, prediction, weights
    kept = TaskOracle(prediction=oracle.prediction[alike], routing_weights=exact[alike], labels=None)
    return kept, prediction[alike], weights[alike]


def _run(model: ir.Model, x: InputRows) -> dict[str, NDArray[np.generic]]:
    proto: onnx.ModelProto = ir.to_proto(model)
    names = [str(value.name) for value in model.graph.inputs]
    with np.errstate(over="ignore", invalid="ignore"):
        outputs = ReferenceEvaluator(proto).run(None, x.feeds(names))
    return dict(zip((str(value.name) for value in model.graph.outputs), outputs, strict=True))

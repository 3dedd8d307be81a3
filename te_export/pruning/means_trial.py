"""One task's captured graph in which any experts can be made to answer their means: which it can spare is tried so.

    e (B, K, D) → Where(removed (K, 1), means (K, D), e) → what read e

It gives the features and their sum as well, which tell what the means are, and that the sum is the experts' by the routing
weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from te_export.models.input_rows import InputRows
from te_export.partition import PREDICTION, ROUTING_WEIGHTS
from te_export.precision.trial import open_trial
from te_export.pruning.mixture import find_mixtures
from te_export.verify.graph_runs import GraphRun, collect_run
from te_runtime.session_types import Session

__all__ = ["Means", "MeansTrial", "find_trial"]

Means = Mapping[int, NDArray[np.float64]]
"""Mean outputs (D,) by expert."""

_BATCH = 64
_REMOVED, _MEANS = "te_export.removed", "te_export.means"
_ROUNDING = 8 * 2.0**-24
"""Of a float32 sum, for each expert in it, over the sum of what is added without signs."""


class MeansTrial:
    """An opened graph of one task.

    Attributes:
        place: which of find_mixtures' it mixes by.
        count: K.
        means: (K, D) float64, over the calibration rows; not finite where features are not.
    """

    def __init__(self, session: Session, place: int, x: InputRows) -> None:
        """Run the graph over rows to learn the means."""
        self.place = place
        self._session = session
        spec = next(spec for spec in session.spec.inputs if spec.name == _MEANS)
        self.count, self._width = (int(axis) for axis in spec.shape)
        self._names = [spec.name for spec in session.spec.inputs if spec.name not in (_REMOVED, _MEANS)]
        total = np.zeros((self.count, self._width))
        self._is_sum = True
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # a mean that is not finite costs more than any budget
            for _, weights, features, fused in self._batches(x):
                total += features.sum(axis=0, dtype=np.float64)
                self._is_sum &= _is_sum(weights, features, fused)
            self.means: NDArray[np.float64] = total / len(x)

    @property
    def is_sum(self) -> bool:
        """Whether, for every row, what was found is the sum of the experts by the routing weights."""
        return self._is_sum

    def answer(self, x: InputRows, means: Means) -> Sequence[NDArray[np.generic]]:
        """Prediction and routing weights while some experts answer their means.

        Raises:
            BundleError: onnxruntime gave up.
        """
        return self._run(x, means)[:2]

    def run(self, x: InputRows, batches: Sequence[NDArray[np.int64]], means: Means) -> GraphRun:
        """The same over batches of rows, as verify runs graphs."""
        feeds = (self._feeds(x[batch], means) for batch in batches)
        return collect_run(self._session, batches, feeds)

    def _batches(self, x: InputRows) -> Iterator[Sequence[NDArray[np.generic]]]:
        for start in range(0, len(x), _BATCH):
            yield self._run(x[start : start + _BATCH], {})

    def _run(self, x: InputRows, means: Means) -> Sequence[NDArray[np.generic]]:
        return self._session.run(self._feeds(x, means))

    def _feeds(self, x: InputRows, means: Means) -> dict[str, NDArray[np.generic]]:
        removed = np.zeros((self.count, 1), np.bool_)
        rows = np.zeros((self.count, self._width), np.float32)
        for expert, mean in means.items():
            removed[expert] = True
            rows[expert] = mean
        return {**x.feeds(self._names), _REMOVED: removed, _MEANS: rows}


def find_trial(captured: ir.Model, places: Sequence[int], x: InputRows, scratch: Path) -> MeansTrial | None:
    """Open a task graph whose experts can go; None where none of its mixtures is their sum by the routing weights.

    Args:
        captured: the task graph before any rewrite; it stays as it is.
        places: which of find_mixtures' to try.
        x: the calibration rows.
        scratch: as open_trial.

    Raises:
        BundleError: onnxruntime cannot run the graph.
    """
    for place in places:
        trial = MeansTrial(open_trial(_with_means(captured.clone(), place), scratch), place, x)
        if trial.is_sum:
            return trial
    return None


def _with_means(model: ir.Model, place: int) -> ir.Model:
    """The graph with the two inputs and the two more outputs, in place."""
    graph = model.graph
    mixture = find_mixtures(graph)[place]
    axes = (mixture.count, mixture.width)
    removed = _input(_REMOVED, ir.DataType.BOOL, (mixture.count, 1))
    means = _input(_MEANS, ir.DataType.FLOAT, axes)
    graph.inputs.extend([removed, means])
    node = ir.Node("", "Where", [removed, means, mixture.features], name=_MEANS)
    node.outputs[0].name = f"{_MEANS}.out"
    node.outputs[0].shape, node.outputs[0].type = mixture.features.shape, mixture.features.type
    for use in list(mixture.features.uses()):
        use.node.replace_input_with(use.idx, node.outputs[0])
    node.replace_input_with(2, mixture.features)
    graph.append(node)
    graph.sort()
    order = {PREDICTION: 0, ROUTING_WEIGHTS: 1}
    outputs = sorted(graph.outputs, key=lambda value: order[str(value.name)])
    fused = mixture.fused
    if fused.is_graph_output():  # the prediction itself
        again = ir.Node("", "Identity", [fused], name=f"{_MEANS}.fused")
        fused = again.outputs[0]
        fused.name, fused.shape, fused.type = f"{_MEANS}.fused", mixture.fused.shape, mixture.fused.type
        graph.append(again)
    graph.outputs.clear()
    graph.outputs.extend([*outputs, mixture.features, fused])
    return model


def _input(name: str, dtype: ir.DataType, axes: tuple[int, int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(axes))


def _is_sum(weights: NDArray[np.generic], features: NDArray[np.generic], fused: NDArray[np.generic]) -> bool:
    """Whether f (B, D) is Σ_k w_k·e_k, to within float32's rounding of such a sum."""
    exact = weights.astype(np.float64)[:, :, None] * features.astype(np.float64)
    count = exact.shape[1]
    allowed = count * _ROUNDING * np.abs(exact).sum(axis=1) + 1e-30
    error = np.abs(fused.astype(np.float64).reshape(len(fused), -1) - exact.sum(axis=1))
    return bool(((error <= allowed) | ~np.isfinite(error)).all())

"""What the manifest says of the accuracy of a variant: of each task, and of each of its layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

from te_runtime.manifest_values import require

__all__ = ["AccuracyMetric", "LayerAccuracy", "LayerLoss", "TaskAccuracy", "check_layers"]

AccuracyMetric = Literal["accuracy", "area under the ROC curve", "R2", "agreement", "relative error"]


class TaskAccuracy(NamedTuple):
    """What one task lost in a variant, against the float64 oracle.

    Attributes:
        metric: what `loss_points` counts, in percentage points: of accuracy, of the area under the ROC curve
            or of R² on labels; of rows with another arg-max than the oracle's; or of the oracle's variance that
            is left unexplained.
        source: the rows: calibration data, those that no range was taken from, or random probe rows.
        budget_points: the most it may lose.
        oracle_percent, variant_percent: the metric on labels; null without.
        agreement: share of rows with the oracle's arg-max; null for one output.
        relative_error: squared error over the oracle's variance.
        routing_kl: mean divergence of the routing weights from the oracle's, in nats.
        top_expert_agreement: share of rows in which the same expert has the largest weight.
    """

    task: str
    source: Literal["calibration data", "probe rows"]
    rows: int
    metric: AccuracyMetric
    loss_points: float
    budget_points: float
    oracle_percent: float | None
    variant_percent: float | None
    agreement: float | None
    relative_error: float
    routing_kl: float | None
    top_expert_agreement: float | None


class LayerLoss(NamedTuple):
    """What one task loses with every layer converted, and with all but some.

    A loss is what TaskAccuracy says under the same name; null where an output was not finite.

    Attributes:
        task: the one that these layers cost most, of those that read them.
        loss_points, relative_error: with every layer converted.
        spared_loss_points, spared_relative_error: with these held more exactly, and all others converted.
    """

    task: str
    loss_points: float | None
    spared_loss_points: float | None
    relative_error: float | None
    spared_relative_error: float | None

    def check(self) -> None:
        for error in (self.relative_error, self.spared_relative_error):
            require(error is None or error >= 0, f"relative error of {self.task!r:.80} is {error!r:.40}")


class LayerAccuracy(NamedTuple):
    """Layers that are converted or kept together, and what that costs the accuracy.

    Attributes:
        weights: of the layers.
        parameters: how many numbers these weights have together.
        tasks: those whose prediction depends on them; null for every task.
        held: `converted`; `kept` more exactly, because a task could not spare them; or `float32`, because the form
            does not convert them.
        loss: what converting them costs the task that it costs most; null where it was not measured.
    """

    weights: tuple[str, ...]
    parameters: int
    tasks: tuple[str, ...] | None
    held: Literal["converted", "kept", "float32"]
    loss: LayerLoss | None

    def check(self) -> None:
        require(bool(self.weights) and all(self.weights), "weights is empty, or a name in it")
        where = f"layers of {self.weights[0]!r:.80}"
        require(
            0 < self.parameters < 2**63, f"parameters of {where} are out of bounds: {self.parameters!r:.40}"
        )
        require(
            self.tasks is None or bool(self.tasks), f"tasks of {where} are none; expected null for every task"
        )


def check_layers(
    layers: Iterable[LayerAccuracy], *, tasks: Collection[str], kept_weights: Collection[str]
) -> None:
    """Refuse layers that contradict the variant they are of.

    Args:
        tasks: names of the bundle's tasks.
        kept_weights: the variant's.

    Raises:
        StrictJsonError: a weight stands twice, a task is none, or it is told otherwise which weights are kept.
    """
    seen: set[str] = set()
    for layer in layers:
        where = f"layers of {layer.weights[0]!r:.80}"
        for name in layer.weights:
            require(name not in seen, f"weight {name!r:.80} stands twice in layers")
            seen.add(name)
            kept = "is" if name in kept_weights else "is not"
            require(
                (layer.held == "kept") == (name in kept_weights),
                f"{where} are {layer.held}, but {name!r:.80} {kept} among kept_weights",
            )
        readers = tasks if layer.tasks is None else layer.tasks
        for task in readers:
            require(task in tasks, f"{where} are read by {task!r:.80}, which is no task")
        require(len(set(readers)) == len(readers), f"{where}: a task stands twice")
        if layer.loss is not None:
            require(
                layer.loss.task in readers,
                f"{where}: loss of {layer.loss.task!r:.80}, which does not read them",
            )

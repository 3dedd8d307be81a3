"""What an executor's thread runs; the seam between the scheduler and models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from te_runtime.errors import InputError
from te_runtime.prediction import Prediction
from te_runtime.row_parts import RowPart
from te_runtime.threads import usable_cpus

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from te_runtime.predictor import Model

__all__ = ["ModelRunner", "Runner", "choose_runners"]


class Runner(Protocol):
    """Answers batches, one at a time; tests pass fakes."""

    @property
    def name(self) -> str:
        """For people, such as `cpu-0`."""

    @property
    def is_lent(self) -> bool:
        """Whether a caller may run a batch in his own thread; not where it could hang, as a device can."""

    def run(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, parts: Sequence[RowPart]
    ) -> list[Prediction]:
        """As te_runtime.predictor.Model.predict_parts. Whatever it raises is the batch's failure."""


@dataclass(frozen=True, slots=True)
class ModelRunner:
    """Runs batches on a loaded model; several may share one."""

    name: str
    model: Model

    @property
    def is_lent(self) -> bool:
        """As Runner.is_lent."""
        return self.model.provider == "cpu"

    def run(
        self, feeds: Mapping[str, NDArray[np.generic]], rows: int, parts: Sequence[RowPart]
    ) -> list[Prediction]:
        """As Runner.run."""
        return self.model.predict_parts(feeds, rows, parts)


def choose_runners(models: Sequence[Model], executors: int | None) -> list[ModelRunner]:
    """The executors for some models: several on one CPU model, one on each other.

    Args:
        models: the same bundle's tasks and inputs, on providers of their own choice.
        executors: how many for each CPU model; None for as many as their threads leave CPUs for.

    Raises:
        InputError: there is no model, one is there twice, or they differ in inputs or tasks. Precisions may differ.
    """
    if not models:
        raise InputError("Scheduler: got no model, expected one or several from te_runtime.load()")
    first = models[0]
    for model in models:
        if model.inputs != first.inputs or model.tasks != first.tasks:
            raise InputError(
                "Scheduler: the models differ in inputs or tasks, and any of them may answer a request: load them "
                "from the same bundle"
            )
        if models.count(model) > 1:
            raise InputError("Scheduler: the same model is there twice: pass it once, and executors=2")
    on_cpu = sum(model.provider == "cpu" for model in models)
    names: dict[str, int] = {}
    runners = []
    for model in models:
        count = 1
        if model.provider == "cpu":
            count = executors or max(1, usable_cpus() // (model.threads * on_cpu))
        for _ in range(count):
            number = names[model.provider] = names.get(model.provider, -1) + 1
            runners.append(ModelRunner(f"{model.provider}-{number}", model))
    return runners

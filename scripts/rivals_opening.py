"""How a subject is opened: what it is given, and what it has to be able to do afterwards."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from rivals_graphs import Graphs
from rivals_models import Model
from rivals_plan import Device, Scope

from te_export.capture.joint_graph import prediction_name

Answers = list[NDArray[np.generic]]
Call = Callable[[], Answers]


class MissingRivalError(ImportError):
    """A rival is not installed, or lacks something; the message says how to get it."""


class Opened(Protocol):
    """A subject that is ready: it may be asked for calls until the next model."""

    def call_for(self, x: NDArray[np.float32]) -> Call:
        """A call without arguments that answers for x (B, D): predictions, for each task one array.

        What a user would do once per batch size is done here; what is done for each batch of rows, in the call.
        """


@dataclass(frozen=True)
class Setting:
    """What a subject is opened with.

    Attributes:
        threads: for all that runs on the CPU.
    """

    model: Model
    graphs: Graphs
    scope: Scope
    device: Device
    threads: int

    @property
    def tasks(self) -> range:
        """The tasks to answer."""
        return range(1 if self.scope is Scope.ONE_TASK else self.model.choice.tasks)

    @property
    def task_names(self) -> list[str]:
        return [self.model.task_names[task] for task in self.tasks]

    @property
    def bundle_outputs(self) -> list[str]:
        """Names of the predictions in te-export's graph of the scope."""
        is_one = self.scope is Scope.ONE_TASK
        return ["prediction"] if is_one else [prediction_name(task) for task in self.task_names]


def import_rival(module: str) -> ModuleType:
    """A package that this benchmark can do without.

    Raises:
        MissingRivalError: it is not installed, or does not load.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingRivalError(
            f"{module} cannot be imported ({error}): pip install -c constraints.txt -e '.[rivals]' installs it"
        ) from error

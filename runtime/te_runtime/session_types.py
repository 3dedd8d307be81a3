"""The seam between te_runtime and ONNX Runtime, as types alone: nothing imports this module while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from te_runtime.manifest import GraphSpec

__all__ = ["Argument", "Binding", "InferenceSession", "Session"]


class Session(Protocol):
    """A graph that can be run; tests pass fakes."""

    @property
    def spec(self) -> GraphSpec:
        """The graph's path, inputs and outputs."""

    def run(self, feeds: Mapping[str, NDArray[np.generic]]) -> Sequence[NDArray[np.generic]]:
        """Run once. `feeds` holds exactly the inputs of `spec`; the answer is in the order of its outputs."""


class Binding(Protocol):
    """Where one run of a graph reads and writes, as onnxruntime.IOBinding; for one thread at a time."""

    def bind_ortvalue_input(self, name: str, value: object) -> None:
        """Read an input from a value."""

    def bind_ortvalue_output(self, name: str, value: object) -> None:
        """Write an output into a value."""

    def bind_output(self, name: str, device_type: str, device_id: int) -> None:
        """Have a new value made for an output on a device."""

    def get_outputs(self) -> list[Any]:
        """The outputs of the last run, as onnxruntime.OrtValue, in the order they were bound."""


class Argument(Protocol):
    """An input or output of a graph, as onnxruntime.NodeArg."""

    name: str
    type: str
    shape: list[int | str | None]


class InferenceSession(Protocol):
    """What is used of onnxruntime.InferenceSession."""

    def get_inputs(self) -> list[Argument]: ...
    def get_outputs(self) -> list[Argument]: ...
    def get_providers(self) -> list[str]: ...
    def io_binding(self) -> Binding: ...
    def run_with_iobinding(self, binding: Binding, run_options: object) -> None: ...
    def run(
        self, names: Sequence[str], feeds: Mapping[str, NDArray[np.generic]], run_options: object = None
    ) -> Sequence[NDArray[np.generic]]: ...

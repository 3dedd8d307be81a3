"""What every way of making a graph smaller has in common.

A form converts the linear layers of a graph in place and leaves its inputs and outputs as they are. It is
given the graphs of a variant one after another and must treat a layer alike in each of them, so that a task
gives the same numbers whichever graph answers it.
"""

from __future__ import annotations

from typing import Protocol

import onnx_ir as ir

from te_runtime.manifest import FormName

__all__ = ["Form"]


class Form(Protocol):
    """One way to convert graphs."""

    @property
    def name(self) -> FormName:
        """How the form is told of."""

    @property
    def kept_as(self) -> str:
        """What the weights of kept layers are held in, for a person: `float32`, or something between."""

    def convert(self, model: ir.Model, kept: frozenset[str]) -> tuple[str, ...]:
        """Convert `model` in place.

        Args:
            model: a graph of float32 values; its tensors may be shared with other graphs and stay as they are.
            kept: names of weights whose layers stay as `kept_as` says; names are those of `weight_names`.

        Returns:
            Names of the weights that were converted, as `weight_names` gives them; empty if there are none.
        """

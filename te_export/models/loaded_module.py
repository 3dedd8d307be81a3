"""A torch module read from a checkpoint whose family is known, ready for the export of any module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["LoadedModule"]


@dataclass(frozen=True)
class LoadedModule:
    """A module in eval mode on the CPU in float32, with what an export needs to know of it.

    Attributes:
        family: its name, for people and the manifest.
        config: in the form a manifest takes: lists of texts are joined by commas.
        module: forward(x (B, *input_shape) float32) → {task name: prediction (B, out)}, in the order of
            `task_names`.
        example_inputs: (64, *input_shape) float32, drawn from a fixed seed in the range the model was made for.
        unused_parameters: in the checkpoint, and read by no prediction.
        notes: what was done on the way that a person may want to know.
    """

    family: str
    config: dict[str, bool | int | float | str | tuple[int, ...]]
    module: nn.Module
    input_name: str
    example_inputs: Tensor
    task_names: tuple[str, ...]
    unused_parameters: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return tuple(self.example_inputs.shape[1:])

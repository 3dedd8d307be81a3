"""The error tree of te_export; each error owns the exit code that the command line maps it to.

TeExportError
├── UsageError                an option or argument is wrong (exit 2)
├── CheckpointError           the checkpoint file is not what can be exported (exit 2)
│   └── UntrustedPickleError  reading it would need to run code from the file (exit 2)
├── OutputError               the bundle cannot be written where it was asked for (exit 2)
├── GateError                 what was built did not pass a check, so nothing is published (exit 1)
│   ├── CaptureError          torch could not be captured as one graph with a symbolic batch axis
│   ├── StructureError        a gate, an expert or a fusion is missing from a graph
│   ├── ParityError           a graph's numbers differ from the oracle's by more than the bound
│   └── AccuracyError         a variant cannot be built within what its tasks may lose
└── DependencyError           a package or library is missing or too old (exit 3)
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AccuracyError",
    "CaptureError",
    "CheckpointError",
    "DependencyError",
    "GateError",
    "OutputError",
    "ParityError",
    "StructureError",
    "TeExportError",
    "UntrustedPickleError",
    "UsageError",
]


class TeExportError(Exception):
    """Base of every error te_export raises on purpose."""

    exit_code: ClassVar[int] = 2


class UsageError(TeExportError, ValueError):
    """An option or argument is wrong: a task name, an opset, a combination of flags."""


class CheckpointError(TeExportError):
    """The checkpoint cannot be read, or holds no model that can be exported."""


class UntrustedPickleError(CheckpointError):
    """The checkpoint can only be rebuilt by running code that it names."""


class OutputError(TeExportError):
    """The output folder exists, is not writable, or ran out of space."""


class GateError(TeExportError):
    """A check on what was built failed; nothing was published."""

    exit_code: ClassVar[int] = 1


class CaptureError(GateError):
    """torch.export or torch.onnx could not give one graph with a symbolic batch axis."""


class StructureError(GateError):
    """A parameter, gate, expert or fusion of the model is missing from a graph."""


class ParityError(GateError):
    """A graph's outputs are further from the float64 oracle than the bound allows."""


class AccuracyError(GateError):
    """A precision variant loses more than its budget on some task, or nothing in it could be converted."""


class DependencyError(TeExportError):
    """A needed package is missing or cannot do what was asked."""

    exit_code: ClassVar[int] = 3

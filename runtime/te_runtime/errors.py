"""The error tree of te_runtime; each error owns the exit code that the command line maps it to.

TeRuntimeError
├── BundleError      the bundle on disk is not what its manifest says (exit 2)
├── InputError       what the caller passed does not fit the model (exit 2)
├── ClosedError      the model was used after close() (exit 2)
└── ProviderError    ONNX Runtime or the execution provider asked for is not there (exit 3)
"""

from __future__ import annotations

from typing import ClassVar

__all__ = ["BundleError", "ClosedError", "InputError", "ProviderError", "TeRuntimeError"]


class TeRuntimeError(Exception):
    """Base of every error te_runtime raises on purpose."""

    exit_code: ClassVar[int] = 2


class BundleError(TeRuntimeError):
    """The bundle is damaged, incomplete, of an unknown version, or not a bundle."""


class InputError(TeRuntimeError, ValueError):
    """An argument does not fit the model: name, shape, dtype, task or value."""


class ClosedError(TeRuntimeError):
    """The model was used after it was closed."""


class ProviderError(TeRuntimeError):
    """ONNX Runtime is missing, installed twice, or cannot give the execution provider asked for."""

    exit_code: ClassVar[int] = 3

"""Runs te-export bundles: predictions per task through ONNX Runtime, without torch.

import te_runtime

with te_runtime.load("model-onnx") as model:
    predictions = model.predict(x)  # {"task_0": Prediction(output, routing_weights), …}

Importing the package loads neither numpy nor onnxruntime; the first use of `load` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from te_runtime.errors import BundleError, ClosedError, InputError, ProviderError, TeRuntimeError

if TYPE_CHECKING:
    from te_runtime.prediction import Prediction
    from te_runtime.predictor import Model, load

__all__ = [
    "BundleError",
    "ClosedError",
    "InputError",
    "Model",
    "Prediction",
    "ProviderError",
    "TeRuntimeError",
    "load",
]


def __getattr__(name: str) -> object:
    if name == "Prediction":
        from te_runtime.prediction import Prediction

        return Prediction
    if name in ("Model", "load"):
        from te_runtime import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

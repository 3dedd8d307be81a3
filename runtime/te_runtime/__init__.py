"""Runs te-export bundles: predictions per task through ONNX Runtime, without torch.

import te_runtime

with te_runtime.load("model-onnx") as model:
    predictions = model.predict(x)  # {"task_0": Prediction(output, routing_weights), …}
"""

from te_runtime.errors import BundleError, ClosedError, InputError, ProviderError, TeRuntimeError
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

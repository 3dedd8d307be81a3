"""Runs te-export bundles: predictions per task through ONNX Runtime, without torch.

import te_runtime

with te_runtime.load("model-onnx") as model:
    predictions = model.predict(x)  # {"task_0": Prediction(output, routing_weights, provider), …}

Importing the package loads neither numpy nor onnxruntime; the first use of `load` does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from te_runtime.errors import (
    BundleError,
    ClosedError,
    DeadlineError,
    InputError,
    ProviderError,
    QueueFullError,
    SchedulerError,
    StallError,
    TeRuntimeError,
)
from te_runtime.forking import holding_back_forks

if TYPE_CHECKING:
    from te_runtime.plan import Mode, Plan
    from te_runtime.prediction import Prediction
    from te_runtime.predictor import Model, load
    from te_runtime.providers import CudaOptions, ProviderChoice
    from te_runtime.scheduling.metrics import SchedulerMetrics
    from te_runtime.scheduling.scheduler import Scheduler
    from te_runtime.utilization import Utilization

__all__ = [
    "BundleError",
    "ClosedError",
    "CudaOptions",
    "DeadlineError",
    "InputError",
    "Mode",
    "Model",
    "Plan",
    "Prediction",
    "ProviderChoice",
    "ProviderError",
    "QueueFullError",
    "Scheduler",
    "SchedulerError",
    "SchedulerMetrics",
    "StallError",
    "TeRuntimeError",
    "Utilization",
    "load",
]


_MODULES = {
    "CudaOptions": "te_runtime.providers",
    "Mode": "te_runtime.plan",
    "Model": "te_runtime.predictor",
    "Plan": "te_runtime.plan",
    "Prediction": "te_runtime.prediction",
    "ProviderChoice": "te_runtime.providers",
    "Scheduler": "te_runtime.scheduling.scheduler",
    "SchedulerMetrics": "te_runtime.scheduling.metrics",
    "Utilization": "te_runtime.utilization",
    "load": "te_runtime.predictor",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with holding_back_forks():  # a child would wait for the import of a thread that it does not have
        return getattr(importlib.import_module(_MODULES[name]), name)

"""torch, eager and compiled. What all tasks share is computed once, as whoever wants all of them would write it."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from reference_graphs import AllTasks, OneTask
from rivals_models import as_arrays
from rivals_opening import Answers, Call, MissingRivalError, Setting
from rivals_plan import Device, Scope

COMPILER = "clang++" if sys.platform == "darwin" else "g++"
Forward = Callable[[torch.Tensor], torch.Tensor | list[torch.Tensor]]


@dataclass(frozen=True)
class TorchCall:
    """A module or what torch.compile made of it, called without gradients."""

    forward: Forward
    device: Device

    def call_for(self, x: NDArray[np.float32]) -> Call:
        forward, device = self.forward, torch.device(self.device)

        def call() -> Answers:
            with torch.inference_mode():
                found = forward(torch.from_numpy(x).to(device))
                # Copying to the CPU waits for the device.
                return as_arrays([found] if isinstance(found, torch.Tensor) else found)

        return call


def open_eager(setting: Setting) -> TorchCall:
    """The module as it is.

    Raises:
        MissingRivalError: CUDA is asked for, and this torch has none.
    """
    if setting.device == "cuda" and not torch.cuda.is_available():
        raise MissingRivalError(
            f"torch {torch.__version__} sees no CUDA device: install a build of torch for CUDA"
        )
    return TorchCall(_module(setting).to(setting.device), setting.device)


def open_compiled(setting: Setting) -> TorchCall:
    """torch.compile with its default settings and freezing, which its makers recommend for inference on CPUs.

    The first batch size is compiled for itself, the second for all further ones. `fullgraph` makes an error of what would
    silently run eagerly instead.

    Raises:
        MissingRivalError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", COMPILER)
    if shutil.which(compiler) is None:
        raise MissingRivalError(
            f"torch.compile needs a C++ compiler and found no {compiler}: install it (Debian and Ubuntu: apt-get "
            "install g++), or name another in the environment variable CXX"
        )
    compiled = torch.compile(_module(setting), fullgraph=True, options={"freezing": True})
    return TorchCall(compiled, setting.device)


def forget_compiled() -> None:
    """Have torch.compile begin anew: it counts how often it compiled, and looks through all that it keeps."""
    torch._dynamo.reset()


def _module(setting: Setting) -> torch.nn.Module:
    model = copy.deepcopy(setting.model.module)  # moving it to a GPU moves it for everybody
    return (OneTask(model) if setting.scope is Scope.ONE_TASK else AllTasks(model)).eval()

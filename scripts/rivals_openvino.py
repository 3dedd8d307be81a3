"""OpenVINO on the CPU, in the way its guide recommends for one caller who waits for each answer.

Latency hint, a batch size that is fixed when the model is compiled, one infer request that is used again, and memory shared
with numpy for rows and answers. The precision is always set: left to itself OpenVINO computes a float32 model in
bfloat16 where the CPU has instructions for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rivals_opening import Answers, Call, MissingRivalError, Setting, import_rival
from rivals_plan import Scope

Hint = Literal["f32", "bf16"]
_CAPABILITY: dict[Hint, str] = {"f32": "FP32", "bf16": "BF16"}
_TYPE: dict[Hint, str] = {"f32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class OpenVinoGraph:
    """A graph that is compiled anew for each batch size.

    Attributes:
        core: OpenVINO's own; its types are not known where it is not installed.
        outputs: names of the predictions, or None for all outputs in their order.
    """

    core: Any
    path: Path
    hint: Hint
    threads: int
    outputs: tuple[str, ...] | None

    def call_for(self, x: NDArray[np.float32]) -> Call:
        model = self.core.read_model(self.path)
        model.reshape(list(x.shape))
        compiled = self.core.compile_model(model, "CPU", self.settings())
        self._check(compiled)
        infer = compiled.create_infer_request().infer
        asked: list[str] | list[int] = list(self.outputs or ()) or list(range(len(compiled.outputs)))

        def call() -> Answers:
            answers = infer(x, share_inputs=True, share_outputs=True)
            return [answers[name] for name in asked]

        return call

    def settings(self) -> dict[str, object]:
        return {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": self.hint,
        }

    def _check(self, compiled: Any) -> None:
        """OpenVINO may answer a wish by something else."""
        found = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        threads = compiled.get_property("INFERENCE_NUM_THREADS")
        if (found, threads) != (self.hint, self.threads):
            raise RuntimeError(
                f"OpenVINO compiled for {found} and {threads} threads, expected {self.hint} and {self.threads}"
            )


def open_openvino(setting: Setting, precision: Hint) -> OpenVinoGraph:
    """torch.onnx's graph of one task, or of all tasks as one."""
    path = setting.graphs.naive if setting.scope is Scope.ONE_TASK else setting.graphs.all_tasks
    return OpenVinoGraph(_core(precision), path, precision, setting.threads, outputs=None)


def open_openvino_on_ours(setting: Setting) -> OpenVinoGraph:
    """te-export's float32 graph."""
    path = setting.graphs.graph("cpu", setting.scope)
    return OpenVinoGraph(_core("f32"), path, "f32", setting.threads, tuple(setting.bundle_outputs))


def _core(hint: Hint) -> Any:
    core = import_rival("openvino").Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if _CAPABILITY[hint] not in capabilities:
        raise MissingRivalError(
            f"OpenVINO does not compute in {_TYPE[hint]} on this CPU, only in {', '.join(capabilities)}"
        )
    return core

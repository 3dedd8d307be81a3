from __future__ import annotations

from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

from te_runtime.probe import probe_graph, probe_provider


def test_the_graph_is_one_product() -> None:
    model = onnx.load_from_string(probe_graph())
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["MatMul"]
    assert model.ir_version == 7
    assert model.opset_import[0].version == 13


def test_the_cpu_runs_it() -> None:
    assert probe_provider(onnxruntime, "CPUExecutionProvider", {}) is None


def pretend(providers: list[str], answer: object) -> ModuleType:
    """onnxruntime whose sessions have `providers` and answer, or raise, `answer`."""

    class Session:
        def __init__(self, *arguments: object, **options: object) -> None:
            pass

        def get_providers(self) -> list[str]:
            return providers

        def run(self, names: object, feeds: object) -> list[object]:
            if isinstance(answer, Exception):
                raise answer
            return [answer]

    return SimpleNamespace(
        capi=SimpleNamespace(onnxruntime_pybind11_state=SimpleNamespace()),
        SessionOptions=onnxruntime.SessionOptions,
        InferenceSession=Session,
    )


RIGHT = np.array([[7, 10], [15, 22]], dtype=np.float32)


@pytest.mark.parametrize(
    ("providers", "answer", "problem"),
    [
        (["CUDAExecutionProvider"], RIGHT, None),
        (["CPUExecutionProvider"], RIGHT, "onnxruntime gave CPUExecutionProvider instead"),
        (["CUDAExecutionProvider"], RIGHT + 1, "it gives wrong numbers: [[8.0, 11.0]"),
        (["CUDAExecutionProvider"], RuntimeError("CUDA\n failure 35"), "CUDA failure 35"),
    ],
)
def test_what_a_session_does_is_judged(providers: list[str], answer: object, problem: str | None) -> None:
    found = probe_provider(pretend(providers, answer), "CUDAExecutionProvider", {})
    assert found is None if problem is None else problem in found

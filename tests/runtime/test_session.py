from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import te_runtime
from te_runtime.bundle import open_bundle
from te_runtime.errors import BundleError, ProviderError
from te_runtime.manifest import GraphSpec
from te_runtime.providers import CudaOptions, choose_provider
from te_runtime.session import OrtSession, open_session


@pytest.fixture(scope="module")
def spec(pristine: Path) -> GraphSpec:
    return open_bundle(pristine).manifest.variants[0].tasks[0].graph


def opened(root: Path, spec: GraphSpec) -> OrtSession:
    return open_session(root / spec.path, spec, provider="cpu", threads=1)


def test_a_graph_runs_and_answers_in_the_order_of_its_spec(pristine: Path, spec: GraphSpec) -> None:
    x = np.ones((3, 6), dtype=np.float32)
    prediction, weights = opened(pristine, spec).run({"x": x})
    assert prediction.shape == (3, 2)
    assert weights.shape == (3, 3)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)  # float32 softmax over three


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "y"}, "its inputs are x, the manifest expects y"),
        (
            {"dtype": "float64"},
            "its input 'x' is float32 (batch, 6), the manifest expects float64 (batch, 6)",
        ),
        ({"shape": ("batch", 7)}, "the manifest expects float32 (batch, 7)"),
        ({"shape": ("batch",)}, "the manifest expects float32 (batch)"),
        ({"shape": (4, 6)}, "the manifest expects float32 (4, 6)"),
        ({"shape": ("batch", "features")}, "the manifest expects float32 (batch, features)"),
    ],
)
def test_another_interface_than_the_spec_is_refused(
    pristine: Path, spec: GraphSpec, change: dict[str, object], message: str
) -> None:
    wrong = spec._replace(inputs=(spec.inputs[0]._replace(**change),))
    with pytest.raises(BundleError) as caught:
        opened(pristine, wrong)
    assert message in str(caught.value)
    assert "task-task_0.onnx" in str(caught.value)


def test_other_outputs_than_the_spec_are_refused(pristine: Path, spec: GraphSpec) -> None:
    with pytest.raises(BundleError, match="its outputs are prediction, routing_weights"):
        opened(pristine, spec._replace(outputs=spec.outputs[:1]))
    with pytest.raises(BundleError, match="its outputs are prediction, routing_weights"):
        opened(pristine, spec._replace(outputs=spec.outputs[::-1]))


def test_a_batch_axis_that_came_out_static_is_refused(
    bundle: Path, tiny: ModuleType, spec: GraphSpec
) -> None:
    def fix_batch(model: object) -> None:
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1

    tiny.edit_graph(bundle, "task-task_0", fix_batch)
    with pytest.raises(BundleError, match=r"output 'prediction' is float32 \(1, 2\), the manifest expects"):
        opened(bundle, spec)


def test_a_file_that_is_no_graph_is_refused_on_one_line(tmp_path: Path, spec: GraphSpec) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"abc" * 10)
    with pytest.raises(BundleError, match=r"bad\.onnx: onnxruntime .* refuses it") as caught:
        open_session(path, spec, provider="cpu", threads=1)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    with pytest.raises(BundleError, match="refuses it"):
        open_session(tmp_path / "missing.onnx", spec, provider="cpu", threads=1)


def test_a_graph_newer_than_onnxruntime_is_told_with_the_opset_to_export(
    bundle: Path, tiny: ModuleType, spec: GraphSpec
) -> None:
    def raise_opset(model: Any) -> None:
        (imported,) = (one for one in model.opset_import if one.domain == "")
        imported.version = 99

    tiny.edit_graph(bundle, "task-task_0", raise_opset)
    with pytest.raises(
        BundleError, match=r"opset is 99, and onnxruntime \S+ runs none after (\d\d)"
    ) as caught:
        opened(bundle, spec)
    message = str(caught.value)
    newest = message.partition("none after ")[2][:2]
    assert message.endswith(f"or export the model again with --opset {newest}.")


class Failing:
    """An InferenceSession that fails while it runs, or gives a provider nobody asked for."""

    def get_inputs(self) -> list[object]:
        return []

    def get_outputs(self) -> list[object]:
        return []

    def get_providers(self) -> list[str]:
        return ["OtherExecutionProvider", "CPUExecutionProvider"]

    def run(self, names: object, feeds: object, run_options: object) -> list[np.ndarray]:
        raise RuntimeError("Status Message:\n Failed to allocate memory")


def test_a_failing_run_names_the_graph(spec: GraphSpec) -> None:
    session = OrtSession(Failing(), spec, (RuntimeError,))
    with pytest.raises(
        BundleError, match=r"fp32/task-task_0\.onnx: failed .*: Status Message: Failed to allocate"
    ):
        session.run({})


def test_another_provider_than_asked_for_is_refused(
    pristine: Path, spec: GraphSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **options: Failing())
    with pytest.raises(
        ProviderError, match="asked onnxruntime for CPUExecutionProvider, got OtherExecutionProvider"
    ):
        opened(pristine, spec)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["OtherExecutionProvider"])
    with pytest.raises(ProviderError, match="has no CPUExecutionProvider"):
        opened(pristine, spec)


def test_options_of_a_session(pristine: Path, spec: GraphSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    real, seen = onnxruntime.InferenceSession, []

    def keep(path: str, options: onnxruntime.SessionOptions, **others: object) -> object:
        seen.append(options)
        return real(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", keep)
    open_session(pristine / spec.path, spec, provider="cpu", threads=2)
    assert (seen[0].intra_op_num_threads, seen[0].inter_op_num_threads) == (2, 1)
    assert seen[0].get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert seen[0].execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    for asked, mode in ((True, "split"), (True, "joint"), (True, "task"), (False, "split")):
        seen.clear()
        with te_runtime.load(pristine, spinning=asked, mode=mode) as model:
            model.prepare()
        assert seen
        assert {one.get_session_config_entry("session.intra_op.allow_spinning") for one in seen} == {
            str(int(asked))
        }


def test_what_cuda_is_asked_for(pristine: Path, spec: GraphSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    seen: list[tuple[onnxruntime.SessionOptions, dict[str, object]]] = []

    def keep(path: str, options: onnxruntime.SessionOptions, **others: object) -> object:
        seen.append((options, others))
        raise RuntimeError("fallback to CPU EP has been explicitly disabled by the user")

    monkeypatch.setattr(onnxruntime, "InferenceSession", keep)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(ProviderError, match="CUDAExecutionProvider does not run every node of this graph"):
        open_session(
            pristine / spec.path,
            spec,
            provider="cuda",
            threads=1,
            cuda=CudaOptions(1, graph_batch_sizes=(8,)),
        )
    ((options, others),) = seen
    assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert others["enable_fallback"] == 0
    ((name, settings),) = others["providers"]
    assert name == "CUDAExecutionProvider"
    assert (settings["device_id"], settings["use_tf32"], settings["enable_cuda_graph"]) == ("1", "0", "1")


def test_a_session_without_the_gpu_asked_for_is_refused(pristine: Path, spec: GraphSpec) -> None:
    if choose_provider("auto").provider == "cuda":
        pytest.skip("needs a machine without a usable NVIDIA GPU")
    with pytest.raises(ProviderError, match=r"has no CUDA|does not run every node"):
        open_session(pristine / spec.path, spec, provider="cuda", threads=1)

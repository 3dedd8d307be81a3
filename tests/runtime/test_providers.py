from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest

from te_runtime.errors import ProviderError
from te_runtime.providers import (
    execution_provider,
    import_onnxruntime,
    installed_onnxruntimes,
    parse_provider,
)


def test_cpu_is_a_provider() -> None:
    assert execution_provider(parse_provider("cpu")) == "CPUExecutionProvider"


@pytest.mark.parametrize("name", ["cuda", "CPU", "", "CPUExecutionProvider", "tensorrt"])
def test_another_provider_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ProviderError, match="available: cpu") as caught:
        parse_provider(name)
    assert caught.value.exit_code == 3


def test_onnxruntime_is_imported() -> None:
    assert len(installed_onnxruntimes()) == 1
    assert hasattr(import_onnxruntime(), "InferenceSession")


def test_two_onnxruntimes_at_once_are_refused_with_the_command_that_mends_it() -> None:
    with pytest.raises(ProviderError) as caught:
        import_onnxruntime(installed=lambda: ("onnxruntime", "onnxruntime-gpu"))
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in str(caught.value)
    assert "te-runtime[cpu]" in str(caught.value)


def test_no_onnxruntime_names_both_ways_to_get_it() -> None:
    def load(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    with pytest.raises(ProviderError, match="not installed") as caught:
        import_onnxruntime(installed=lambda: (), load=load)
    assert "te-runtime[cpu]" in str(caught.value)
    assert "te-runtime[gpu]" in str(caught.value)


def test_an_onnxruntime_that_does_not_load_is_told() -> None:
    def without_library(name: str) -> ModuleType:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    def without_package(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'flatbuffers'", name="flatbuffers")

    with pytest.raises(ProviderError, match=r"does not load: libcudart\.so\.13"):
        import_onnxruntime(load=without_library)
    with pytest.raises(ProviderError, match="package 'flatbuffers' is missing"):
        import_onnxruntime(load=without_package)


def test_an_onnxruntime_removed_in_part_is_told() -> None:
    with pytest.raises(ProviderError, match="installed in part"):
        import_onnxruntime(installed=lambda: (), load=lambda name: SimpleNamespace())

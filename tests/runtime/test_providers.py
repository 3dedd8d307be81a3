from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest

from te_runtime.errors import InputError, ProviderError
from te_runtime.onnxruntime_install import import_onnxruntime, installed_onnxruntimes
from te_runtime.providers import (
    CudaOptions,
    ProviderChoice,
    choose_provider,
    execution_provider,
    parse_provider,
)


def test_cpu_is_a_provider() -> None:
    assert execution_provider(parse_provider("cpu")) == "CPUExecutionProvider"


@pytest.mark.parametrize("name", ["CUDA", "CPU", "", "CPUExecutionProvider", "tensorrt"])
def test_another_provider_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ProviderError, match="expected 'cpu', 'cuda' or 'auto'") as caught:
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


def test_cpu_is_given_without_looking(fake: ModuleType) -> None:
    machine = fake.FakeMachine()
    assert choose_provider("cpu", machine=machine) == ProviderChoice("cpu", "cpu", "asked for", None)
    assert machine.asked == []


def test_auto_takes_cuda_where_a_graph_ran_and_says_so(fake: ModuleType) -> None:
    choice = choose_provider("auto", machine=fake.FakeMachine())
    assert choice == ProviderChoice("auto", "cuda", "a graph ran on NVIDIA Test GPU", "NVIDIA Test GPU")
    assert choose_provider("cuda", machine=fake.FakeMachine()).reason == "asked for"


def test_auto_takes_the_cpu_where_cuda_is_broken_and_cuda_is_refused(fake: ModuleType) -> None:
    machine = fake.FakeMachine(problems={"CUDAExecutionProvider": "out of memory"})
    choice = choose_provider("auto", machine=machine)
    assert (choice.provider, choice.device) == ("cpu", None)
    assert "out of memory" in choice.reason
    with pytest.raises(ProviderError, match=r"provider 'cuda' does not work here: .*out of memory") as caught:
        choose_provider("cuda", machine=machine)
    assert caught.value.exit_code == 3


def test_several_problems_tell_the_first_and_count_the_rest(fake: ModuleType) -> None:
    machine = fake.FakeMachine(driver_found=fake.NO_DRIVER, on_loader_path=frozenset())
    with pytest.raises(ProviderError, match=r"And 1 more: te-runtime doctor"):
        choose_provider("cuda", machine=machine)


def test_no_onnxruntime_is_an_error_for_auto_as_well(fake: ModuleType) -> None:
    with pytest.raises(ProviderError, match="not installed"):
        choose_provider("auto", machine=fake.FakeMachine(installed={}))


@pytest.mark.parametrize(
    "options",
    [
        {"device_id": -1},
        {"device_id": True},
        {"graph_batch_sizes": (0,)},
        {"graph_batch_sizes": [1]},
        {"graph_batch_sizes": (1, 1)},
        {"graph_batch_sizes": tuple(range(1, 100))},
    ],
)
def test_options_out_of_bounds_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="expected"):
        CudaOptions(**options)

"""One ONNX graph, loaded and ready to run; the seam between te_runtime and ONNX Runtime."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, cast

from te_runtime.errors import BundleError, ProviderError
from te_runtime.manifest import GraphSpec, TensorSpec
from te_runtime.onnxruntime_install import import_onnxruntime, onnxruntime_errors
from te_runtime.providers import CudaOptions, Provider, execution_provider

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from te_runtime.session_types import Argument, Binding, InferenceSession

__all__ = ["OrtSession", "open_session"]

_ERROR, _FATAL = 3, 4  # onnxruntime's log levels; what is fatal to a session is raised as well
_NEWER_OPSET = re.compile(r"Opset (\d+) is under development.* till opset (\d+)", re.DOTALL)
_NO_FALLBACK = "fallback to CPU EP has been explicitly disabled"

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class OrtSession:
    """A Session of ONNX Runtime. `run` may be called from many threads at once."""

    __slots__ = ("_errors", "_names", "_run", "_session", "spec")

    def __init__(
        self, session: InferenceSession, spec: GraphSpec, errors: tuple[type[Exception], ...]
    ) -> None:
        self.spec = spec
        self._session = session
        # InferenceSession.run is Python around the bound session within: it looks at the feeds' names, which are
        # right here, and tries again on other providers, which must not be. Without it a run takes 1.3 µs less.
        self._run = getattr(session, "_sess", session).run
        self._names = [output.name for output in spec.outputs]
        self._errors = errors

    def run(self, feeds: Mapping[str, NDArray[np.generic]]) -> Sequence[NDArray[np.generic]]:
        """Run the graph once.

        Args:
            feeds: exactly the inputs of `spec`, C-contiguous, with its dtypes and shapes.

        Returns:
            The outputs in the order of `spec.outputs`.

        Raises:
            BundleError: ONNX Runtime gave up while it ran.
        """
        try:
            return self._run(self._names, feeds, None)
        except self._errors as error:
            raise self._failure(error) from error

    def new_binding(self) -> Binding:
        """A binding of this graph, with nothing bound."""
        return self._session.io_binding()

    def run_bound(self, binding: Binding, run_options: object = None) -> None:
        """Run the graph once, reading and writing what is bound; `run_options` is an onnxruntime.RunOptions.

        Raises:
            BundleError: ONNX Runtime gave up while it ran.
        """
        try:
            self._session.run_with_iobinding(binding, run_options)
        except self._errors as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> BundleError:
        return BundleError(
            f"{self.spec.path}: failed while it ran: {_one_line(error)}. "
            "If memory ran out, pass fewer rows at a time; otherwise run te-runtime verify on the bundle."
        )


def open_session(
    path: str | os.PathLike[str],
    spec: GraphSpec,
    *,
    provider: Provider,
    threads: int,
    spinning: bool = False,
    cuda: CudaOptions | None = None,
) -> OrtSession:
    """Load one graph.

    Args:
        path: the .onnx file; its weights are found in the same folder.
        spec: the interface the graph must have.
        provider: where to run it; every node of it, for CUDA.
        threads: how many CPU threads one run may use.
        spinning: whether they turn in circles while they wait for work.
        cuda: how to run it on CUDA.

    Raises:
        BundleError: ONNX Runtime refuses the file, or its interface is not `spec`.
        ProviderError: ONNX Runtime is missing, does not give the provider, or cannot run every node there.
    """
    ort = import_onnxruntime()
    errors = onnxruntime_errors(ort)
    wanted = execution_provider(provider)
    if wanted not in ort.get_available_providers():
        raise ProviderError(
            f"this onnxruntime has no {wanted}; it has {', '.join(ort.get_available_providers())}"
        )
    options = _session_options(ort, threads, provider, spinning=spinning)
    providers = [(wanted, _provider_options(provider, cuda or CudaOptions()))]
    try:
        # Without enable_fallback=0 onnxruntime would print, and try the CPU.
        session = cast(
            "InferenceSession",
            ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0),
        )
    except errors as error:
        if _NO_FALLBACK in str(error):
            raise ProviderError(
                f"{path}: {wanted} does not run every node of this graph: {_one_line(error)}. "
                "Run te-runtime doctor to see whether it runs any; otherwise use provider cpu."
            ) from error
        newer = _NEWER_OPSET.search(str(error))
        if newer is not None:
            raise BundleError(
                f"{path}: its ONNX opset is {newer[1]}, and onnxruntime {ort.__version__} runs none after {newer[2]}. "
                f"Install a newer onnxruntime here, or export the model again with --opset {newer[2]}."
            ) from error
        raise BundleError(
            f"{path}: onnxruntime {ort.__version__} refuses it: {_one_line(error)}. "
            "Copy the bundle again whole, or export the model again beside this version of onnxruntime."
        ) from error
    found = session.get_providers()
    if found[:1] != [wanted]:
        raise ProviderError(f"asked onnxruntime for {wanted}, got {', '.join(found)}")
    _check_arguments(path, "input", session.get_inputs(), spec.inputs)
    _check_arguments(path, "output", session.get_outputs(), spec.outputs)
    return OrtSession(session, spec, errors)


def _session_options(ort: ModuleType, threads: int, provider: Provider, *, spinning: bool) -> object:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    options.log_severity_level = _FATAL if provider == "cuda" else _ERROR
    if provider != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return cast(object, options)


def _provider_options(provider: Provider, cuda: CudaOptions) -> dict[str, str]:
    """Options that change results or memory; the rest is left as ONNX Runtime has it."""
    if provider != "cuda":
        return {}
    return {
        "device_id": str(cuda.device_id),
        # The default doubles the device memory that the arena holds each time it grows.
        "arena_extend_strategy": "kSameAsRequested",
        # The default tries every algorithm anew for each batch size.
        "cudnn_conv_algo_search": "HEURISTIC",
        # On by default, and cuts the 23 bits of a float32 to 10 before each product.
        "use_tf32": "0",
        "enable_cuda_graph": "1" if cuda.graph_batch_sizes else "0",
    }


def _check_arguments(
    path: str | os.PathLike[str], kind: str, found: list[Argument], expected: tuple[TensorSpec, ...]
) -> None:
    names = [argument.name for argument in found]
    wanted = [spec.name for spec in expected]
    if names != wanted:
        raise BundleError(
            f"{path}: its {kind}s are {', '.join(names)}, the manifest expects {', '.join(wanted)}. "
            "Export the model again."
        )
    for argument, spec in zip(found, expected, strict=True):
        dtype = _DTYPES.get(argument.type, argument.type)
        if dtype != spec.dtype or not _is_same_shape(argument.shape, spec.shape):
            raise BundleError(
                f"{path}: its {kind} {spec.name!r} is {dtype} {_shown(argument.shape)}, the manifest expects "
                f"{spec.dtype} {_shown(spec.shape)}. Export the model again."
            )


def _is_same_shape(found: Sequence[int | str | None], expected: Sequence[int | str]) -> bool:
    """Same rank, same numbers, and an open axis (whatever its name) exactly where one is expected."""
    return len(found) == len(expected) and all(
        axis == wanted if isinstance(wanted, int) else not isinstance(axis, int)
        for axis, wanted in zip(found, expected, strict=True)
    )


def _shown(shape: Sequence[int | str | None]) -> str:
    return f"({', '.join('?' if axis is None else str(axis) for axis in shape)})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400].rstrip(".") or type(error).__name__

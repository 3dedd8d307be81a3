"""Subjects that ONNX Runtime runs: torch.onnx's graphs as they come and through onnxslim, te-export's, and the roof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from rivals_graphs import graph_of_task
from rivals_opening import Answers, Call, MissingRivalError, Setting, import_rival
from rivals_plan import Device, Scope

import te_runtime
from te_runtime.providers import execution_provider

ROOF_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Sessions:
    """Sessions that run one after another.

    Attributes:
        names: outputs to ask each session for.
    """

    sessions: Sequence[onnxruntime.InferenceSession]
    names: Sequence[str]

    def call_for(self, x: NDArray[np.float32]) -> Call:
        sessions = [(session.run, {session.get_inputs()[0].name: x}) for session in self.sessions]
        names = list(self.names)

        def call() -> Answers:
            return [answer for run, feed in sessions for answer in run(names, feed)]

        return call


def open_session(graph: str | bytes, *, device: Device, threads: int) -> onnxruntime.InferenceSession:
    """A session with ONNX Runtime's own settings, but for the threads.

    Raises:
        RuntimeError: it would run elsewhere than asked for, which ONNX Runtime does in silence.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    name = execution_provider(device)
    # By its default CUDA cuts float32 to 10 bits before each product, which torch does not.
    provider = (name, {"use_tf32": "0"}) if device == "cuda" else name
    session = onnxruntime.InferenceSession(graph, options, providers=[provider])
    if session.get_providers()[0] != name:
        raise RuntimeError(f"asked for {name}, ONNX Runtime opened {session.get_providers()}")
    return session


def open_naive(setting: Setting) -> Sessions:
    """torch.onnx.export of one task, as it comes; for all tasks a session for each."""
    if setting.scope is Scope.ONE_TASK:
        return _sessions([str(setting.graphs.naive)], setting)
    return _sessions([graph.SerializeToString() for graph in _task_graphs(setting)], setting)


def open_slimmed(setting: Setting) -> Sessions:
    """The same graphs through onnxslim."""
    slim = import_rival("onnxslim").slim
    return _sessions([slim(graph).SerializeToString() for graph in _task_graphs(setting)], setting)


def open_all_tasks_graph(setting: Setting) -> Sessions:
    """torch.onnx.export of all tasks as one graph, as it comes."""
    return _sessions([str(setting.graphs.all_tasks)], setting)


def open_te_export(setting: Setting, precision: str = "fp32") -> Sessions:
    """te-export's graph of one task or of all, in a bare session.

    Raises:
        MissingRivalError: te-export made no int8 variant of this model.
    """
    if precision == "int8" and not setting.graphs.has_int8:
        raise MissingRivalError(f"te-export published no int8 variant: {setting.graphs.int8}")
    path = setting.graphs.graph(setting.device, setting.scope, precision)
    return Sessions(
        [open_session(str(path), device=setting.device, threads=setting.threads)], setting.bundle_outputs
    )


@dataclass(frozen=True)
class Predictor:
    """te_runtime's own way in. It gives the routing weights as well."""

    model: te_runtime.Model
    tasks: list[str]

    def call_for(self, x: NDArray[np.float32]) -> Call:
        predict, tasks = self.model.predict, self.tasks

        def call() -> Answers:
            return [prediction.output for prediction in predict(x, tasks).values()]

        return call


def open_te_runtime(setting: Setting) -> Predictor:
    """te_runtime.load in split mode."""
    model = te_runtime.load(
        setting.graphs.bundles[setting.device],
        provider=setting.device,
        precision="fp32",
        threads=setting.threads,
        mode="split",
    )
    return Predictor(model, setting.task_names)


@dataclass(frozen=True)
class Roof:
    """One Gemm that writes into memory which is there already: its output is far larger than predictions are, and
    making room for it would count as time of the Gemm's.
    """

    session: onnxruntime.InferenceSession
    device: Device

    def call_for(self, x: NDArray[np.float32]) -> Call:
        binding = self.session.io_binding()
        binding.bind_cpu_input("x", x)
        (output,) = self.session.get_outputs()
        room = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            [len(x), output.shape[1]], np.float32, self.device
        )
        binding.bind_ortvalue_output(output.name, room)
        run = partial(self.session.run_with_iobinding, binding)
        if self.device == "cuda":
            # The run alone does not wait for the device. Rows are copied there anew, as for all others.
            run = partial(_run_on_device, self.session, binding, x)

        def call() -> Answers:
            run()
            return []

        return call


def open_roof(setting: Setting) -> Roof:
    """One Gemm of the bytes and multiply-adds of te-export's graph.

    Raises:
        ArithmeticError: it computes something else.
    """
    path = setting.graphs.roofs[setting.scope]
    session = open_session(str(path), device=setting.device, threads=setting.threads)
    x = setting.model.batch(2)
    weight = next(
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(path).graph.initializer
        if tensor.name == "w"
    )
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    error = float(np.abs(session.run(None, {"x": x})[0] - expected).max() / expected.std())
    if not error <= ROOF_TOLERANCE:
        raise ArithmeticError(f"the roof's Gemm is {error:.2g} of its spread off, allowed {ROOF_TOLERANCE}")
    return Roof(session, setting.device)


def _run_on_device(
    session: onnxruntime.InferenceSession, binding: onnxruntime.IOBinding, x: NDArray[np.float32]
) -> None:
    binding.bind_cpu_input("x", x)
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()


def _task_graphs(setting: Setting) -> list[onnx.ModelProto]:
    return [graph_of_task(setting.graphs, setting.model, task) for task in setting.tasks]


def _sessions(graphs: Sequence[str | bytes], setting: Setting) -> Sessions:
    sessions = [open_session(graph, device=setting.device, threads=setting.threads) for graph in graphs]
    return Sessions(sessions, [output.name for output in sessions[0].get_outputs()])

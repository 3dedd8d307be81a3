"""A session on a graph of one node, which shows whether an execution provider really runs here.

ONNX Runtime answers a request for CUDA with a session on the CPU where CUDA does not load, so that a session
was made proves nothing. The probe forbids the CPU to take the node, and compares the numbers.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from te_runtime.onnxruntime_install import onnxruntime_errors

__all__ = ["probe_graph", "probe_provider"]

_FLOAT = 1  # TensorProto.DataType
_IR_VERSION, _OPSET = 7, 13
_QUIET = 4  # of onnxruntime's log levels, fatal errors only


def probe_graph() -> bytes:
    """The bytes of the ONNX model y = MatMul(x, x), x float32 (2, 2); field numbers as in onnx.proto."""
    node = _text(1, "x") + _text(1, "x") + _text(2, "y") + _text(4, "MatMul")  # NodeProto
    graph = _field(1, node) + _text(2, "probe")  # GraphProto: node, name
    graph += _field(11, _value("x")) + _field(12, _value("y"))  # GraphProto: input, output
    opset = _number(2, _OPSET)  # OperatorSetIdProto: version
    return _number(1, _IR_VERSION) + _field(7, graph) + _field(8, opset)  # ModelProto


def probe_provider(ort: ModuleType, execution_provider: str, options: dict[str, str]) -> str | None:
    """Run the probe.

    Args:
        ort: the module onnxruntime.
        execution_provider: ONNX Runtime's name of the provider.
        options: options of the provider.

    Returns:
        Why the provider does not run here, or None if it does.
    """
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = 1
    session_options.log_severity_level = _QUIET
    if execution_provider != "CPUExecutionProvider":
        session_options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    x = np.array([[1, 2], [3, 4]], dtype=np.float32)
    try:
        session = ort.InferenceSession(
            probe_graph(), session_options, providers=[(execution_provider, options)], enable_fallback=0
        )
        providers = session.get_providers()
        (y,) = session.run(["y"], {"x": x})
    except onnxruntime_errors(ort) as error:
        return " ".join(str(error).split())[:400]
    if providers[:1] != [execution_provider]:
        return f"onnxruntime gave {', '.join(providers)} instead"
    if not np.array_equal(y, x @ x):
        return f"it gives wrong numbers: {y.tolist()} for [[7, 10], [15, 22]]"
    return None


def _value(name: str) -> bytes:
    """ValueInfoProto: name, and a type that is a tensor of float32 (2, 2)."""
    dimension = _field(1, _number(1, 2))
    tensor = _number(1, _FLOAT) + _field(2, dimension + dimension)
    return _text(1, name) + _field(2, _field(1, tensor))


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field; payloads here are shorter than 128 bytes."""
    return bytes([number << 3 | 2, len(payload)]) + payload


def _text(number: int, text: str) -> bytes:
    return _field(number, text.encode("ascii"))


def _number(number: int, value: int) -> bytes:
    """A protobuf varint field for a value below 128."""
    return bytes([number << 3, value])

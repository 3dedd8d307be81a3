"""Which ONNX opset the graphs are written in."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from te_export.errors import DependencyError, UsageError

__all__ = ["OLDEST_OPSET", "choose_opset", "newest_opset"]

OLDEST_OPSET = 18
"""torch's exporter translates to this opset; older ones would go through a down-conversion that it does not
promise.
"""


def newest_opset() -> int:
    """The newest opset that the installed onnxruntime runs and the installed onnx knows, found by asking
    onnxruntime.
    """
    for opset in range(onnx.defs.onnx_opset_version(), OLDEST_OPSET - 1, -1):
        if _runs(opset):
            return opset
    raise DependencyError(
        f"the installed onnxruntime runs no opset from {OLDEST_OPSET} on. Upgrade it: pip install -U "
        "onnxruntime"
    )


def choose_opset(asked: int | None) -> int:
    """The opset asked for, or the newest one.

    Raises:
        UsageError: the installed packages cannot write or run the opset asked for.
    """
    newest = newest_opset()
    if asked is None:
        return newest
    if not OLDEST_OPSET <= asked <= newest:
        raise UsageError(
            f"--opset {asked}: expected {OLDEST_OPSET} to {newest}, the opsets that torch writes and the "
            "installed onnxruntime runs. "
            "Leave --opset out to get the newest."
        )
    return asked


def _runs(opset: int) -> bool:
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import (
        Fail,
        InvalidGraph,
    )
    from onnxruntime.capi.onnxruntime_pybind11_state import (
        NotImplemented as NotImplementedInOrt,
    )

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "probe",
        [value("x", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidGraph, NotImplementedInOrt):
        return False
    return True

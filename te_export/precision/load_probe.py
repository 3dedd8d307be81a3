"""Loading a graph in a process of its own first, since onnxruntime's float16 fusions can end the process that loads it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir

from te_runtime.errors import BundleError

__all__ = ["check_load_is_survived", "holds_float16"]

_LOAD = """
import sys
import onnxruntime
onnxruntime.set_default_logger_severity(4)
onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
"""


def holds_float16(model: ir.Model) -> bool:
    """Whether any value of the graph, weights included, is float16."""
    values = (*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs))
    return any(value.dtype == ir.DataType.FLOAT16 for value in values)


def check_load_is_survived(path: Path) -> None:
    """Load a graph on the CPU elsewhere. What onnxruntime merely refuses is left to who loads it here.

    Raises:
        BundleError: onnxruntime ended the process that loaded it.
    """
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(path)], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode < 0:
        raise BundleError(
            f"onnxruntime ends the process that loads {path.name}, with {_name(-done.returncode)}. It is a defect of the "
            "installed onnxruntime: another version may load it"
        )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

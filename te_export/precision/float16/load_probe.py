"""Loading graphs in a process of their own first, since onnxruntime's float16 fusions can end the process that loads it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from te_runtime.errors import BundleError

__all__ = ["check_loads_are_survived", "holds_float16"]

_LOAD = """
import sys
import onnxruntime
onnxruntime.set_default_logger_severity(4)
for index, path in enumerate(sys.argv[1:]):
    print(index, flush=True)
    try:
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:
        print(error, file=sys.stderr)
"""


def holds_float16(model: ir.Model) -> bool:
    """Whether any value of the graph, weights included, is float16."""
    values = (*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs))
    return any(value.dtype == ir.DataType.FLOAT16 for value in values)


def check_loads_are_survived(paths: Sequence[Path]) -> None:
    """Load graphs on the CPU elsewhere, one after another. What onnxruntime merely refuses is left to who loads it here.

    Raises:
        BundleError: onnxruntime ended the process that loaded one.
    """
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, *map(str, paths)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        begun = [paths[int(line)].name for line in done.stdout.split() if line.isdecimal()]
        raise BundleError(
            f"onnxruntime ends the process that loads {begun[-1] if begun else 'a graph'}, with {_name(-done.returncode)}. "
            "It is a defect of the installed onnxruntime: another version may load it"
        )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

"""Opening a graph that may never be shipped: written into a scratch folder, as a bundle's graphs are."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import onnx_ir as ir

from te_export.bundle.graph_file import WEIGHTS_NAME, linked_bytes, tensor_specs
from te_export.bundle.weights_file import plan_weights, weight_chunks
from te_export.precision.float16.load_probe import check_loads_are_survived, holds_float16
from te_runtime.errors import BundleError
from te_runtime.manifest import GraphSpec
from te_runtime.session import open_session
from te_runtime.session_types import Session

__all__ = ["open_trial"]


def open_trial(model: ir.Model, scratch: Path, *, threads: int = 1) -> Session:
    """Open a graph on the CPU, under a folder of its own within `scratch`, which the caller removes.

    Raises:
        BundleError: onnxruntime refuses the graph, or ends the process that loads it.
        OSError: the disk is full.
    """
    folder = scratch / secrets.token_hex(4)
    folder.mkdir()
    layout = plan_weights([model.graph])
    with (folder / WEIGHTS_NAME).open("wb") as file:
        for chunk in weight_chunks(layout):
            file.write(chunk)
    path = folder / "graph.onnx"
    path.write_bytes(linked_bytes(model, layout))
    spec = GraphSpec(
        path=path.name,
        inputs=tensor_specs(list(model.graph.inputs)),
        outputs=tensor_specs(list(model.graph.outputs)),
    )
    try:
        if holds_float16(model):
            check_loads_are_survived([path])
        return open_session(path, spec, provider="cpu", threads=threads)
    except BundleError as error:
        # The scratch folder has another name each time and is gone when the message is read.
        told = str(error).replace(f"{folder}{os.sep}", "")
        raise BundleError(told) from error

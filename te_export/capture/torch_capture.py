"""ONE capture of all tasks through torch.export and torch.onnx."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch.nn.utils.parametrize import is_parametrized

from te_export.capture.joint_graph import JointGraph
from te_export.capture.opset import OLDEST_OPSET
from te_export.capture.tidy import BATCH, tidy
from te_export.errors import CaptureError
from te_export.models.exportable import ExportableModel
from te_export.modules.blame import line_of_node
from te_export.partition import PREDICTION, ROUTING_WEIGHTS

__all__ = ["capture", "quiet_torch"]

_NO_FORM = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")
_TRACED_ROWS = 2
"""torch.export specializes sizes 0 and 1, so the batch axis is traced with two rows."""


def capture(model: ExportableModel, opset: int) -> JointGraph:
    """Capture the model as one ONNX graph with a symbolic batch axis.

    Args:
        model: the module is in eval mode.
        opset: the ONNX opset to write.

    Raises:
        CaptureError: torch refuses the module, or the batch axis is not symbolic in the graph.
    """
    with quiet_torch():
        exported = _export(model)
        renamed = _rename_parameters(exported.graph, model)
        captured = tidy(
            exported,
            parameter_prefix=model.parameter_prefix,
            inputs=[spec.name for spec in model.inputs],
            outputs=model.output_names,
            opset=opset,
        )
    sources = {**model.sources, **{new: model.sources.get(old, (old,)) for new, old in renamed.items()}}
    return JointGraph(model=captured, tasks=model.task_names, opset=opset, sources=sources)


def _rename_parameters(graph: ir.Graph, model: ExportableModel) -> dict[str, str]:
    """Other names for parameters called as an input or output is, which a graph cannot hold twice; by new name, the old."""
    prefix, given = model.parameter_prefix, set(graph.initializers)
    reserved = {*(spec.name for spec in model.inputs), *model.output_names, PREDICTION, ROUTING_WEIGHTS}
    renamed: dict[str, str] = {}
    for full in sorted(given):
        old = full.removeprefix(prefix)
        if old not in reserved:
            continue
        new = f"{old}.parameter"
        while prefix + new in given or new in reserved:
            new += "_"
        graph.initializers[full].name = prefix + new
        renamed[new] = old
    return renamed


def _export(model: ExportableModel) -> ir.Model:
    from torch._dynamo.exc import (
        TorchDynamoException,  # now: looked up in an `except`, an interrupt could meet it
    )
    from torch.onnx.errors import OnnxExporterError  # half imported

    batch = torch.export.Dim(BATCH)
    try:
        program = model.program or torch.export.export(
            model.module,
            model.example_rows(_TRACED_ROWS),
            dynamic_shapes=tuple({0: batch} for _ in model.inputs),
            strict=False,
        )
        onnx_program = torch.onnx.export(
            program, dynamo=True, opset_version=OLDEST_OPSET, optimize=False, verbose=False
        )
    except (TorchDynamoException, OnnxExporterError, RuntimeError, ValueError) as error:
        raise CaptureError(_told(error, model)) from error
    if onnx_program is None:
        raise CaptureError("torch.onnx.export gave no program; this needs torch 2.9 or newer")
    return onnx_program.model


def _told(error: BaseException, model: ExportableModel) -> str:
    """The innermost of the errors that torch wraps into one another, and an operator without ONNX form for what it is."""
    while error.__cause__ is not None:
        error = error.__cause__
    missing = _NO_FORM.search(str(error))
    if missing is None:
        return f"torch could not capture the model: {type(error).__name__}: {str(error).strip():.600}"
    where = _line_of_operator(missing[1], model)
    advice = "Write that part of forward with other operators, or compute it beforehand and keep the result in a buffer"
    if model.eager is not None and any(map(is_parametrized, model.eager.modules())):
        advice += (
            ". A parametrized weight becomes a plain one by torch.nn.utils.parametrize.remove_parametrizations(layer, "
            '"weight")'
        )
    return f"torch has no ONNX form of {missing[1]}{f' ({where})' if where else ''}. {advice}"


def _line_of_operator(name: str, model: ExportableModel) -> str:
    """The user's line that calls an operator, or one that torch takes apart into it."""
    if model.program is None:
        return ""
    try:
        nodes = [*model.program.graph.nodes, *model.program.run_decompositions().graph.nodes]
    except Exception:  # noqa: BLE001 - only the line is lost; the error itself is told by the caller
        return ""
    return next((line_of_node(node) for node in nodes if str(node.target).startswith(f"{name}.")), "")


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Keep torch's own remarks on its internals (optional packages, deprecations within torch) off the
    person's screen.
    """
    known = [*logging.root.manager.loggerDict]
    loggers = [logging.getLogger(name) for name in known if name.split(".")[0] in ("torch", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

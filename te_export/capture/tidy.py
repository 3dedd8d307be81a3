"""Making a captured graph reproducible and readable: parameter names of the checkpoint, one name for the
batch axis, no traces of
the machine it was captured on, and none of the arithmetic on shapes that tracing leaves behind."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer, version_converter

from te_export.errors import CaptureError

__all__ = ["BATCH", "tidy"]

BATCH = "batch"


def tidy(
    model: ir.Model, *, parameter_prefix: str, inputs: Sequence[str], outputs: Sequence[str], opset: int
) -> ir.Model:
    """Clean a freshly captured model in place and return it.

    Constants are folded, repeated sub-expressions merged and the opset converted while the weights are out
    of sight, so that no pass can
    copy, drop or merge a parameter: an all-zero bias stays, and two equal tensors stay two.

    Args:
        parameter_prefix: what the capture put before every parameter name.
        inputs, outputs: names for the graph's inputs and outputs, by position.
        opset: the opset to convert to.

    Raises:
        CaptureError: the opset cannot be reached; a branch or loop stayed in the graph; the batch axis of an
            input or output is not symbolic, or is not the same for all.
    """
    _name_inputs(model.graph, inputs)
    weights = _hide_weights(model.graph)
    optimizer.optimize(model)
    _refuse_subgraphs(model.graph)
    _convert(model, opset)
    passes.ClearMetadataAndDocStringPass()(model)
    _clear_values(model.graph)
    _free_names(model.graph, {*outputs, *(name.removeprefix(parameter_prefix) for name in weights)})
    _show_weights(model.graph, weights, parameter_prefix)
    _name_outputs(model.graph, outputs)
    _name_batch_axis(model.graph)
    _name_nodes(model.graph)
    model.graph.name = "joint"
    model.producer_name = "te-export"
    model.producer_version = None
    return model


def _clear_values(graph: ir.Graph) -> None:
    """The pass before this one leaves what is noted on graph inputs and on values between nodes."""
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        value.metadata_props.clear()
        value.meta.clear()
        value.doc_string = None


def _hide_weights(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in list(graph.initializers.items()):
        if value.const_value is None:
            raise CaptureError(
                f"initializer {name!r} has no value after capture; report this with the torch version in use"
            )
        weights[name] = value.const_value
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    return weights


def _refuse_subgraphs(graph: ir.Graph) -> None:
    """A branch or loop reads values of the graph around it without naming them as inputs: no cut would bring those along."""
    for node in graph:
        if any(map(_reads_from_outside, _bodies(node))):
            raise CaptureError(
                f"torch writes a part of forward as ONNX's {node.op_type}, whose body cannot be taken apart into a graph "
                "for each task: take torch.cond, while_loop and scan out of forward, compute both sides and choose with "
                "torch.where, and loop in Python over a fixed number of steps"
            )


def _reads_from_outside(body: ir.Graph) -> bool:
    nodes = list(ir.traversal.RecursiveGraphIterator(body))
    graphs = [body, *(inner for node in nodes for inner in _bodies(node))]
    made = {output for node in nodes for output in node.outputs}
    made |= {value for graph in graphs for value in (*graph.inputs, *graph.initializers.values())}
    read = {value for node in nodes for value in node.inputs if value is not None}
    return not (read | {value for graph in graphs for value in graph.outputs}) <= made


def _bodies(node: ir.Node) -> list[ir.Graph]:
    bodies: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            bodies.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies += attribute.as_graphs()
    return bodies


def _convert(model: ir.Model, opset: int) -> None:
    version_converter.convert_version(model, opset, fallback=True)
    reached = model.graph.opset_imports.get("")
    if reached != opset:  # the converter logs its failures and goes on
        raise CaptureError(
            f"the captured graph could not be converted to opset {opset}: it stayed at opset {reached}. "
            "Choose an older one with --opset, down to 18."
        )


def _show_weights(graph: ir.Graph, weights: Mapping[str, ir.TensorProtocol], prefix: str) -> None:
    for value in [value for value in graph.inputs if value.name in weights]:
        assert value.name is not None  # it was looked up by its name
        graph.inputs.remove(value)
        if not value.uses():
            continue
        tensor = weights[value.name]
        value.name = value.name.removeprefix(prefix)
        value.const_value = tensor
        graph.register_initializer(value)


def _free_names(graph: ir.Graph, names: Collection[str]) -> None:
    """Give values between nodes other names than those: torch calls what `mul` gives `mul`, as a buffer may be called."""
    values = [output for node in graph for output in node.outputs]
    taken = {*names, *(value.name for value in (*graph.inputs, *values, *graph.initializers.values()))}
    for value in values:
        if value.name not in names:
            continue
        candidate, count = f"{value.name}.value", 1
        while candidate in taken:
            count += 1
            candidate = f"{value.name}.value_{count}"
        taken.add(candidate)
        value.name = candidate


def _name_inputs(graph: ir.Graph, names: Sequence[str]) -> None:
    if len(graph.inputs) != len(names):
        raise CaptureError(
            f"the capture has {len(graph.inputs)} inputs, expected {len(names)}: {', '.join(names[:6])}, …"
        )
    taken = set(names)
    for value in (output for node in graph for output in node.outputs):
        if value.name in taken:
            value.name = f"{value.name}.value"
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name


def _name_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    if len(graph.outputs) != len(names):
        raise CaptureError(
            f"the capture has {len(graph.outputs)} outputs, expected {len(names)}: {', '.join(names[:6])}, …"
        )
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name


def _name_batch_axis(graph: ir.Graph) -> None:
    symbols = {_batch_symbol(value, "input") for value in graph.inputs} | {
        _batch_symbol(value, "output") for value in graph.outputs
    }
    if len(symbols) != 1:
        raise CaptureError(
            f"inputs and outputs do not share one batch axis: found {', '.join(sorted(symbols))}"
        )
    (symbol,) = symbols
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            axes = [_named_axis(axis, symbol) for axis in value.shape]
            known = [axis for axis in axes if axis is not None]
            value.shape = ir.Shape(known) if len(known) == len(axes) else None


def _named_axis(axis: int | ir.SymbolicDim, symbol: str) -> int | str | None:
    """An axis under its usual name: `batch`, or `20*batch` where sequences were laid out as rows; None for any other."""
    if isinstance(axis, int):
        return axis
    count, product, factor = _text(axis).rpartition("*")
    if factor != symbol or (product and not count.isdecimal()):
        return None
    return f"{count}{product}{BATCH}"


def _batch_symbol(value: ir.Value, kind: str) -> str:
    if value.shape is None or len(value.shape) == 0 or isinstance(value.shape[0], int):
        raise CaptureError(
            f"the batch axis of {kind} {value.name!r} came out static ({value.shape}): the graph would be "
            "right only at the traced "
            "batch size. Take out of the module's forward what turns a tensor's size into a Python number."
        )
    return _text(value.shape[0])


def _text(axis: int | ir.SymbolicDim) -> str:
    return str(axis) if isinstance(axis, int) else str(axis.value)


def _name_nodes(graph: ir.Graph) -> None:
    """Name each node by its first parameter's layer where it has one, else by its operator and position."""
    counts: dict[str, int] = {}
    for node in graph:
        names = [
            value.name for value in node.inputs if value is not None and value.name in graph.initializers
        ]
        layers = [name.rpartition(".")[0] for name in names if name is not None]
        stem = next((layer for layer in layers if layer), node.op_type.lower())
        index = counts.get(stem, 0)
        counts[stem] = index + 1
        node.name = stem if layers and stem != node.op_type.lower() and index == 0 else f"{stem}_{index}"

"""A batch normalization right after a layer is part of that layer.

    h = layer(x; W, b)                         y = layer(x; s·W, s·(b - μ) + β)
    y = BatchNormalization(h; γ, β, μ, σ²)     s = γ / √(σ² + ε), one for each output channel   (h is gone)

The layer is a Gemm or a Conv of any group; without a bias its b is 0. The formula is that of the operator's
specification for training_mode 0. The new weights are computed in float64 and rounded once, so the folded layer
rounds less than the two did. Only where nothing else reads h, and nothing else reads W: that would stay beside s·W.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from te_export.rewrite.edit import Edit
from te_export.rewrite.linear import is_float_constant, only_reader, read_linear, tensor_of
from te_export.rewrite.log import Applied, Declined, Findings

__all__ = ["RULE", "fold_batch_norms"]

RULE = "fold_batch_norms"

_DEFAULT_EPSILON = 1e-5
_LAYERS = ("Gemm", "Conv")


@dataclass(frozen=True)
class _Layer:
    """A Gemm or a Conv with constant weights.

    Attributes:
        bias: (channels,), or None.
        axis: the axis of the weight that counts output channels.
    """

    node: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    channels: int
    axis: int


@dataclass(frozen=True)
class _Norm:
    """A BatchNormalization with constants (channels,)."""

    node: ir.Node
    scale: ir.Value
    shift: ir.Value
    mean: ir.Value
    variance: ir.Value
    epsilon: float


@dataclass(frozen=True)
class _Fold:
    layer: _Layer
    norm: _Norm
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


def fold_batch_norms(graph: ir.Graph) -> Findings:
    """Fold every batch normalization that follows a layer into it, in place."""
    applied: list[Applied] = []
    declined: list[Declined] = []
    sources: dict[str, tuple[str, ...]] = {}
    for node in list(graph):
        first = _match(node)
        if first is None:
            continue
        checked = _check(first, node)
        if isinstance(checked, str):
            declined.append(Declined(RULE, str(first.name), checked))
        else:
            sources |= _rewrite(graph, checked)
            applied.append(Applied(RULE, str(first.name), f"{node.name} after it folded into its weights"))
    return Findings(tuple(applied), tuple(declined), sources)


def _match(node: ir.Node) -> ir.Node | None:
    """The layer before a batch normalization; the normalization itself where there is none."""
    if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx") or node.inputs[0] is None:
        return None
    first = node.inputs[0].producer()
    return first if first is not None and first.op_type in _LAYERS else node


def _check(first: ir.Node, node: ir.Node) -> _Fold | str:
    if first is node:
        return f"it normalizes {_origin(node.inputs[0])}, expected what a Gemm or a Conv gives"
    layer = _read_layer(first)
    if isinstance(layer, str):
        return layer
    norm = _read_norm(node, layer.channels)
    if isinstance(norm, str):
        return f"{node.name} after it cannot be folded: {norm}"
    given = first.outputs[0]
    if given.is_graph_output():
        return f"its output {given.name} leaves the graph"
    if only_reader(given) is not node:
        return f"its output is also read by {_others(given, node)}"
    if layer.weight.is_graph_output():
        return f"its weight {layer.weight.name} leaves the graph, so the folded one would be a second of its size"
    if only_reader(layer.weight) is not first:
        return (
            f"its weight {layer.weight.name} is also read by {_others(layer.weight, first)}, so the folded one "
            "would be a second of its size"
        )
    weight, bias = _folded(layer, norm)
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        return f"with {node.name} folded into them, its weights are not finite in float32"
    return _Fold(layer, norm, weight, bias)


def _read_layer(node: ir.Node) -> _Layer | str:
    if node.op_type == "Conv":
        return _read_conv(node)
    linear = read_linear(node)
    if isinstance(linear, str):
        return linear
    return _Layer(node, linear.weight, linear.bias, linear.width_out, axis=int(linear.turned))


def _read_conv(node: ir.Node) -> _Layer | str:
    if node.domain not in ("", "ai.onnx"):
        return f"it is a Conv of {node.domain}"
    _, weight, bias = (*node.inputs, None)[:3]
    assert weight is not None  # the operator requires it
    rank = 0 if weight.const_value is None else len(weight.const_value.shape)
    if not is_float_constant(weight, rank=rank):
        return "its weight is not a float32 constant"
    channels = int(tensor_of(weight).shape.numpy()[0])
    if bias is not None and not _is_row(bias, channels):
        return "its bias is not a float32 constant of one value per output"
    return _Layer(node, weight, bias, channels, axis=0)


def _read_norm(node: ir.Node, channels: int) -> _Norm | str:
    training = node.attributes.get("training_mode")
    if training is not None and training.as_int() != 0:
        return "it takes mean and variance from the batch (training_mode 1)"
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "its running mean or variance is read"
    constants = [value for value in node.inputs[1:] if value is not None]
    for name, value in zip(("scale", "bias", "mean", "variance"), constants, strict=True):
        if not _is_row(value, channels):
            return f"its {name} is not a float32 constant of {channels} values, one for each channel"
    scale, shift, mean, variance = constants
    epsilon = node.attributes.get("epsilon")
    return _Norm(
        node, scale, shift, mean, variance, _DEFAULT_EPSILON if epsilon is None else epsilon.as_float()
    )


def _is_row(value: ir.Value, size: int) -> bool:
    return is_float_constant(value, rank=1) and tuple(tensor_of(value).shape.numpy()) == (size,)


def _origin(value: ir.Value | None) -> str:
    node = None if value is None else value.producer()
    return "no node's output" if node is None else f"what {node.name} gives, a {node.op_type}"


def _others(value: ir.Value, node: ir.Node) -> str:
    """The nodes beside `node` that read `value`; `node` itself where it reads it twice."""
    names = dict.fromkeys(str(use.node.name) for use in value.uses() if use.node is not node)
    return ", ".join(names) or f"{node.name} once more"


def _folded(layer: _Layer, norm: _Norm) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """s·W in the layout of W, and s·(b - μ) + β (channels,), in float64, rounded once."""
    weight = _float64(layer.weight)
    bias = np.zeros(layer.channels) if layer.bias is None else _float64(layer.bias)
    along = [1] * weight.ndim
    along[layer.axis] = layer.channels
    with np.errstate(all="ignore"):  # _check looks for what is not finite
        factor = _float64(norm.scale) / np.sqrt(_float64(norm.variance) + norm.epsilon)
        shifted = factor * (bias - _float64(norm.mean)) + _float64(norm.shift)
        return (weight * factor.reshape(along)).astype(np.float32), shifted.astype(np.float32)


def _float64(value: ir.Value) -> NDArray[np.float64]:
    return tensor_of(value).numpy().astype(np.float64)


def _rewrite(graph: ir.Graph, fold: _Fold) -> dict[str, tuple[str, ...]]:
    edit = Edit(graph)
    layer, norm = fold.layer, fold.norm
    weight = edit.initializer(ir.tensor(fold.weight), name=f"{layer.weight.name}.folded")
    # Named for the layer: a bias may be shared, and a name means one tensor in all graphs.
    bias = edit.initializer(ir.tensor(fold.bias), name=f"{layer.node.name}.bias.folded")
    layer.node.resize_inputs(3)
    layer.node.replace_input_with(1, weight)
    layer.node.replace_input_with(2, bias)
    edit.replace(norm.node.outputs[0], layer.node.outputs[0])
    edit.done()
    shifts = (layer.bias, norm.mean, norm.shift, norm.scale, norm.variance)
    return {
        str(weight.name): _names(layer.weight, norm.scale, norm.variance),
        str(bias.name): _names(*(value for value in shifts if value is not None)),
    }


def _names(*values: ir.Value) -> tuple[str, ...]:
    return tuple(str(value.name) for value in values)

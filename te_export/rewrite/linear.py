"""Reading a Gemm node as a linear layer with constant weights, y = x·Wᵀ + b."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from te_export.rewrite.edit import Axes, axes_of

__all__ = [
    "ACTIVATIONS",
    "Linear",
    "activated",
    "activation_key",
    "is_float_constant",
    "only_reader",
    "read_linear",
    "tensor_of",
]

ACTIVATIONS = frozenset(
    {"Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"}
    | {"Softplus", "Softsign", "Mish", "ThresholdedRelu"}
)
"""Operators of one input that treat every element alike: they may be applied to a stack as a whole."""


@dataclass(frozen=True)
class Linear:
    """A Gemm with constant weights.

    Attributes:
        weight: (out, in); (in, out) where `turned`.
        bias: (out,), or None.
    """

    node: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    width_in: int
    width_out: int
    turned: bool

    @property
    def x(self) -> ir.Value:
        """What it reads now: a change elsewhere may have put another value there."""
        value = self.node.inputs[0]
        assert value is not None  # the operator requires it
        return value

    @property
    def y(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def name(self) -> str:
        return str(self.node.name)

    @property
    def axes(self) -> Axes:
        """The shape of y; where it was not recorded, its rows need not be those of the batch."""
        return axes_of(self.y) or ("rows", self.width_out)

    def weight_out_in(self) -> NDArray[np.float32]:
        """The weight as (out, in), whichever way it is stored."""
        values: NDArray[np.float32] = tensor_of(self.weight).numpy()
        return values.T if self.turned else values


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """The tensor of an initializer."""
    assert value.const_value is not None  # read_linear saw it
    return value.const_value


def read_linear(node: ir.Node) -> Linear | str:
    """The linear layer that `node` is, or why it is none."""
    if node.op_type != "Gemm" or node.domain not in ("", "ai.onnx"):
        return f"it is a {node.op_type}, expected a Gemm"
    if _number(node, "alpha", 1.0) != 1.0 or _number(node, "beta", 1.0) != 1.0:
        return "its alpha or beta is not 1"
    if _number(node, "transA", 0) != 0:
        return "its input is transposed"
    weight, bias = (*node.inputs, None)[1:3]
    assert weight is not None  # the operator requires it
    if not is_float_constant(weight, rank=2):
        return "its weight is not a float32 constant"
    turned = _number(node, "transB", 0) == 0
    sizes = [int(axis) for axis in tensor_of(weight).shape.numpy()]
    width_in, width_out = sizes if turned else sizes[::-1]
    if bias is not None and not (
        is_float_constant(bias, rank=1) and tuple(tensor_of(bias).shape.numpy()) == (width_out,)
    ):
        return "its bias is not a float32 constant of one value per output"
    return Linear(node, weight, bias, width_in=width_in, width_out=width_out, turned=turned)


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, at one place; None if there are others or it leaves the graph."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def activated(value: ir.Value) -> ir.Value:
    """What the one activation that reads `value` gives; activation_key has found that there is one."""
    reader = only_reader(value)
    assert reader is not None
    return reader.outputs[0]


def activation_key(value: ir.Value) -> tuple[str, ...] | None:
    """Operator and attributes of the one activation that reads `value`; None if there is none."""
    reader = only_reader(value)
    if reader is None or reader.op_type not in ACTIVATIONS or len(reader.inputs) != 1:
        return None
    return (reader.op_type, *sorted(f"{name}={attr.value}" for name, attr in reader.attributes.items()))


def is_float_constant(value: ir.Value, *, rank: int) -> bool:
    """Whether `value` is a float32 initializer of so many axes that no caller can replace."""
    tensor = value.const_value
    return (
        value.is_initializer()
        and not value.is_graph_input()
        and tensor is not None
        and tensor.dtype == ir.DataType.FLOAT
        and len(tensor.shape) == rank
    )


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)

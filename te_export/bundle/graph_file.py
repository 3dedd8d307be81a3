"""Turning a graph into the bytes of an .onnx file: pointing into weights.bin, or standing alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx_ir as ir

from te_export.bundle.weights_file import WeightsLayout
from te_export.errors import OutputError
from te_runtime.manifest import DType, TensorSpec

__all__ = ["WEIGHTS_NAME", "linked_bytes", "standalone_bytes", "tensor_specs"]

WEIGHTS_NAME = "weights.bin"
_PROTOBUF_LIMIT_BYTES = 2**31 - 1
_DTYPES: dict[ir.DataType | None, DType] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
    ir.DataType.BOOL: "bool",
}
"""What inputs may be; everything between them and the outputs is float32 or a count."""


def linked_bytes(model: ir.Model, layout: WeightsLayout) -> bytes:
    """The graph with every laid-out initializer named as plain external data `weights.bin` in its own
    folder.
    """
    with _linked(model.graph, layout):
        return _serialize(model)


def standalone_bytes(model: ir.Model, name: str) -> bytes:
    """The graph with its weights inside.

    Raises:
        OutputError: it would pass 2 GiB, which protobuf, and so ONNX, cannot hold in one file.
    """
    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    if size >= _PROTOBUF_LIMIT_BYTES:
        raise OutputError(
            f"--standalone: {name} has {size / 2**30:.2f} GiB of weights, and one ONNX file holds at most "
            "2 GiB. "
            "Leave --standalone out: the bundle's own graphs keep their weights beside them."
        )
    return _serialize(model)


def tensor_specs(values: list[ir.Value]) -> tuple[TensorSpec, ...]:
    """Name, dtype and symbolic shape of graph inputs or outputs."""
    return tuple(_tensor_spec(value) for value in values)


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None  # graph inputs and outputs are named
    assert value.shape is not None  # capture checked it
    shape = tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape)
    return TensorSpec(name=value.name, dtype=_DTYPES[value.dtype], shape=shape)


def _serialize(model: ir.Model) -> bytes:
    proto: onnx.ModelProto = ir.to_proto(model)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


@contextmanager
def _linked(graph: ir.Graph, layout: WeightsLayout) -> Iterator[None]:
    """While open, the graph's large initializers are references into weights.bin instead of values."""
    held: dict[str, ir.TensorProtocol] = {}
    try:
        for name, value in graph.initializers.items():
            if name in layout.places and value.const_value is not None:
                held[name] = value.const_value
                value.const_value = _reference(name, value.const_value, layout.places[name])
        yield
    finally:
        for name, tensor in held.items():
            graph.initializers[name].const_value = tensor


def _reference(name: str, tensor: ir.TensorProtocol, place: tuple[int, int]) -> ir.ExternalTensor:
    offset, length = place
    return ir.ExternalTensor(
        WEIGHTS_NAME,
        offset,
        length,
        tensor.dtype,
        shape=ir.Shape(tuple(tensor.shape.numpy())),
        name=name,
        base_dir="",
    )
